"""Batches are cut where their loss is the mean of the pieces' losses, and nowhere else."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators import pieces as planning
from flatbench.errors import InputError
from tests.curvature.curvature_cases import CASES


@pytest.mark.parametrize("products", ["exact", "differences", "auto"])
def test_losses_that_are_no_means_are_not_cut(products: Any) -> None:
    model, batches = CASES["mlp"].make()

    def of_the_batch(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).var()

    one = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    with HessianOperator(model, of_the_batch, one, products=products) as made:
        room = made.plan.peak_bytes
    vector = torch.ones(made.dimension).double()
    right = made @ vector
    refused = 0
    for share in (1.6, 1.2, 0.8, 0.4):
        memory = int(share * room) + 4 * 8 * made.dimension
        try:
            found = HessianOperator(model, of_the_batch, one, memory=memory, products=products) @ vector
        except InputError as error:
            assert re.search("not the mean over its examples|do not hold", str(error))
            refused += "not the mean" in str(error)
        else:
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-8)
    assert refused


def _hardest(model: nn.Module, batch: Any) -> Tensor:
    """Of the 32 hardest rows of those that are together: of 32 rows or fewer their mean."""
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.topk(min(32, len(losses))).values.mean()


def _rare_class(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """A rare class weighs more; the terms that are told are rows, and the mean is over weights."""
    weight = torch.tensor([1.0, 1.0, 12.0]).double()
    return nn.functional.cross_entropy(model(batch[0]), batch[1], weight=weight), len(batch[0])


def _rows(count: int = 64) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    labels = torch.randint(0, 2, (count,))
    labels[[5, 6]] = 2  # in no sample of eight rows that are evenly spaced
    return model, (torch.randn(count, 6).double(), labels)


@pytest.mark.parametrize("products", ["exact", "differences", "auto"])
@pytest.mark.parametrize("loss", [_hardest, _rare_class])
def test_losses_that_are_means_on_few_rows_alone_are_not_cut(loss: Any, products: Any) -> None:
    """No few rows show it: the pieces are compared with the whole batch, which a forward pass holds."""
    model, batch = _rows()
    with HessianOperator(model, loss, [batch], products=products) as made:
        room = made.plan.peak_bytes
        vector = torch.ones(made.dimension).double()
        right = made @ vector
    refused = 0
    for share in (1.6, 0.8, 0.5, 0.3, 0.2):
        memory = int(share * room) + 4 * 8 * made.dimension
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found = HessianOperator(model, loss, [batch], memory=memory, products=products) @ vector
        except InputError as error:
            assert re.search("not the mean over its examples|do not hold", str(error))
            refused += "not the mean" in str(error)
        else:  # in two layers a forward pass takes nearly what a graph does: it may not fit either
            unseen = any("seen on parts of it alone" in str(each.message) for each in told)
            assert unseen or torch.allclose(found, right, rtol=1e-5, atol=1e-8)
            refused += unseen
    assert refused


@pytest.mark.parametrize("loss", [_hardest, _rare_class])
def test_such_losses_are_not_cut_for_the_caches_either(loss: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = _rows(256)
    right = HessianOperator(model, loss, [batch]) @ torch.ones(83).double()
    monkeypatch.setattr(planning, "CACHED", 20_000)

    def means(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    with HessianOperator(model, means, [batch]) as cut:
        assert len(cut.plan.kept) + len(cut.plan.rebuilt) > 1
    with HessianOperator(model, loss, [batch]) as made:
        assert len(made.plan.kept) + len(made.plan.rebuilt) == 1
        torch.testing.assert_close(made @ torch.ones(83).double(), right)
