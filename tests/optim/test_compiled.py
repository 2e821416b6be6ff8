"""Models that torch.compile has compiled, as a whole or in part, find their two points as others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.models import adapted, snapshot
from tests.optim.test_points import BOTH, make, reference

X = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def step(optimizer: Any, model: nn.Module, called: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 20, generator=generator).double()
    y = torch.randint(0, 3, (32,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(called(x), y).backward()
    optimizer.step()


WAYS = ["before", "after", "in place", "base model", "part"]
#: every method in one way and every way with two methods; all of them with all in `make test-long`
CASES = [
    pytest.param(
        name,
        how,
        marks=[] if how == WAYS[i % len(WAYS)] or name in ("sam", "eflat_lora") else pytest.mark.long,
    )
    for i, name in enumerate(BOTH)
    for how in WAYS
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_compiled_model(name: str, how: str) -> None:
    torch._dynamo.reset()
    model: Any = adapted()
    called: Any = model
    inner = model.base_model
    if how == "before":
        called = torch.compile(model, backend="eager")
    optimizer = make(name, called)
    if how == "after":
        called = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "base model":
        inner.model = torch.compile(inner.model, backend="eager")
    elif how == "part":
        inner.model.second = torch.compile(inner.model.second, backend="eager")
    found: list[Tensor] = []
    for _ in range(4):
        step(optimizer, model, called)
        called.eval()
        with torch.no_grad():
            found.append(called(X))
        called.train()
    optimizer.eval()
    weights = {key.replace("_orig_mod.", ""): value for key, value in snapshot(model).items()}
    expected = reference(name, 4)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value)
    plain = adapted()
    with torch.no_grad():
        for key, value in plain.state_dict().items():
            value.copy_(expected[key])
    torch.testing.assert_close(found[-1], plain(X).detach())
