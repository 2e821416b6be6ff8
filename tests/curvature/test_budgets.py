"""Budgets of memory that are too small are refused with one that is enough."""

from __future__ import annotations

import functools
import gc
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator, spectral_density, top_eigenpairs, trace
from flatbench.curvature.operators import memory as memory_
from flatbench.errors import InputError
from tests.curvature import chain_cases as cases
from tests.curvature.curvature_cases import lora

QV = ["q_proj", "v_proj"]


def _squares(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(batch["x"]).square().mean(), len(batch["x"])


def _net(rows: int) -> tuple[nn.Module, dict[str, Tensor]]:
    net = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)).double()
    return net, {"x": torch.randn(rows, 64, dtype=torch.float64)}


def _named(error: InputError) -> int:
    """The memory that a refusal names."""
    named = re.search(r"about ([\d.]+ [kM]B) would", str(error))
    assert named, error
    return memory_.parsed(named[1].replace(" ", ""))


@pytest.mark.slow
@pytest.mark.parametrize("products", ["exact", "differences"])
@pytest.mark.parametrize("chain", [True, False])
def test_too_little_memory_is_refused_with_what_would_fit(products: Any, chain: bool) -> None:
    """The budget that a refusal names is enough, and not much more than that."""
    if chain:
        model = cases.shaken(lora(cases.llama(), QV))
        make = functools.partial(cases.causal, model, space="adapter", products=products)
    else:
        net, batch = _net(32)
        make = functools.partial(HessianOperator, net, _squares, [batch], space="all", products=products)
    with pytest.raises(InputError, match=r"about .* would") as refused, make(memory=5_000) as made:
        made.plan  # noqa: B018
    needed = _named(refused.value)
    with make(memory=needed) as made:
        made.plan  # noqa: B018
    with pytest.raises(InputError, match=r"about .* would"), make(memory=int(needed * 0.97)) as made:
        made.plan  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    "search",
    [
        lambda operator: top_eigenpairs(operator, k=20),
        lambda operator: trace(operator, rank=40, max_products=300),
        lambda operator: spectral_density(operator, steps=60, probes=3),
    ],
)
def test_a_search_names_a_memory_that_is_enough(search: Any) -> None:
    """Vectors beside the graphs are counted in the budget that is named."""
    net, batch = _net(2)
    memory, refusals = 5_000, 0
    for _ in range(3):
        try:
            with HessianOperator(net, _squares, [batch], space="all", memory=memory) as operator:
                search(operator)
            break
        except InputError as error:
            memory, refusals = _named(error), refusals + 1
    else:
        raise AssertionError("what a refusal names is refused again")
    assert refusals == 2  # by the graphs, then by the vectors


def _graphs() -> int:
    """Tensors with a graph that are alive."""
    gc.collect()
    return sum(isinstance(found, Tensor) and found.grad_fn is not None for found in gc.get_objects())


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("memory", [None, 300_000])
def test_a_plan_keeps_no_graph_alive(chain: bool, memory: int | None) -> None:
    """An output that an operation saves for itself is held by its own graph, which no collector sees."""
    before = _graphs()
    for _ in range(2):
        if chain:
            model = cases.shaken(lora(cases.llama(), QV))
            operator = cases.causal(model, space="adapter", products="exact", memory=memory)
        else:
            net, batch = _net(2)
            operator = HessianOperator(net, _squares, [batch], space="all", memory=memory and 10 * memory)
        with operator:
            operator @ torch.ones(operator.dimension, dtype=torch.float64)
        del operator
    assert _graphs() == before


def test_a_batch_without_labels_changes_no_plan() -> None:
    """Its graph takes nothing, and says nothing of the others'."""
    torch.manual_seed(0)
    model = cases.llama().double()
    ids = torch.randint(0, cases.V, (3, 8))
    batch = {"input_ids": ids, "labels": ids}
    none = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    plans = []
    for batches in ([batch], [none, batch], [batch, none]):
        with HessianOperator(model, None, batches, space="all", memory=10**9, products="exact") as made:
            plans.append(made.plan.peak_bytes)
    assert plans[0] <= plans[1] == plans[2]
