"""IVON against its rule written plainly, against the authors' package, and its draws."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flatbench import optim
from flatbench.distributed.shard import Shard
from flatbench.errors import InputError
from flatbench.optim.ivon import IVON
from tests.optim import plain_rules
from tests.optim.models import adapted, problem, trainable
from tests.optim.test_rules import relative

ESS = 50.0


def adamw(model: Any, decay: float = 1e-2) -> torch.optim.Optimizer:
    first, *rest = trainable(model)
    groups = [{"params": [first], "weight_decay": 0.0, "lr": 0.02}, {"params": rest, "weight_decay": decay}]
    return torch.optim.AdamW(groups, lr=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_of_the_rule(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer, lender = IVON(adamw(model), model, ess=ESS, seed=3), adamw(twin)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer.base, lender)]
    memory: dict[str, Any] = {}
    for seed in range(10):
        optimizer.step(problem(model, seed))
        plain_rules.ivon(twin, lender, problem(twin, seed), memory, optimizer.draws, ESS, 1.0)
        for scheduler in schedulers:
            scheduler.step()
    optimizer.eval()
    assert relative(model, twin) <= (1e-12 if dtype == torch.float64 else 1e-6)


def test_the_authors_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """ivon-opt with our draws in the place of its own."""
    peer = pytest.importorskip("ivon", reason="a cross-check only: pip install --no-deps ivon-opt")
    model = adapted(dtype=torch.float64)
    twin = copy.deepcopy(model)
    options = {"ess": ESS, "hess_init": 0.5, "beta1": 0.8, "beta2": 0.99}
    optimizer = IVON(torch.optim.AdamW(trainable(model), lr=0.05, weight_decay=1e-2), model, **options)
    torch.set_default_dtype(torch.float64)
    try:
        other = peer.IVON(trainable(twin), lr=0.05, weight_decay=1e-2, clip_radius=1e9, **options)
        for step in range(10):
            draws = torch.cat([z.flatten() for z in optimizer.draws(step)])
            optimizer.step(problem(model, step))
            with monkeypatch.context() as patch:
                patch.setattr(torch, "randn", lambda *_, draws=draws, **__: draws)
                sampled = other.sampled_params(train=True)
                sampled.__enter__()
            problem(twin, step)()
            sampled.__exit__(None, None, None)
            other.step()
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer.eval()
    assert relative(model, twin) <= 1e-10


def test_draws_are_of_the_posterior() -> None:
    """Over many steps without learning, the spread of the weights is that of the rule, around the mean."""
    model = adapted()
    optimizer = IVON(torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.0), model, ess=4.0, beta2=0.0)
    with torch.no_grad():
        mean = [p.clone() for p in trainable(model)]
    seen = []
    for step in range(200):
        for z, p in zip(optimizer.draws(step), trainable(model), strict=True):
            assert z.shape == p.shape
        seen.append(torch.cat([z.flatten() for z in optimizer.draws(step)]))
    everything = torch.stack(seen)
    assert abs(float(everything.mean())) < 0.02
    assert abs(float(everything.std()) - 1) < 0.02
    optimizer.train()
    moved = torch.cat([(p - m).detach().flatten() for p, m in zip(trainable(model), mean, strict=True)])
    torch.testing.assert_close(moved, seen[0] / 2, rtol=1e-4, atol=1e-6)  # 1/sqrt(ess·h0)
    optimizer.eval()
    assert all(map(torch.equal, trainable(model), mean))


def test_the_step_is_clipped_by_entries() -> None:
    model = adapted()
    before = [p.detach().clone() for p in trainable(model)]
    base = torch.optim.AdamW(trainable(model), lr=0.1, weight_decay=0.0)
    optimizer = IVON(base, model, ess=ESS, clip_radius=1e-4)
    optimizer.step(problem(model))
    optimizer.eval()
    largest = max(float((p - old).abs().max()) for p, old in zip(trainable(model), before, strict=True))
    assert largest == pytest.approx(1e-5, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "ivon needs ess"),
        ({"ess": 0.0}, "ess must be positive"),
        ({"ess": 1.0, "beta2": 1.0}, "beta1 and beta2 must be in"),
        ({"ess": 1.0, "clip_radius": -1.0}, "clip_radius must be positive"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=words):
        IVON(adamw(model), model, **options)


def test_parts_of_parameters_are_refused() -> None:
    """Draws of parts would not be those of the whole."""
    model = adapted()
    base = torch.optim.AdamW([Shard(p.detach()) for p in trainable(model)], lr=0.1)
    with pytest.raises(InputError, match="divided among processes"):
        IVON(base, model, ess=1.0)


@pytest.mark.parametrize("wrap", [optim.SAM, optim.EMA])
def test_it_makes_its_own_update(wrap: Callable[..., Any]) -> None:
    model = adapted()
    with pytest.raises(InputError, match="cannot go around"):
        IVON(wrap(adamw(model), model), model, ess=1.0)
