"""Points of a landscape are losses of the moved model, for every kind of adapter and for shared weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flatbench.landscape.explore import landscape
from flatbench.models.factors import adapted_modules
from flatbench.seeding import derive_seed
from flatbench.subject.directions import random_direction
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests import adapter_kinds, shared_cases
from tests.measures.measure_cases import same, snapshot

CASES = [
    *((adapter_kinds, name, "adapter") for name in ("parameter", "experts", "adalora", "in_proj_weight")),
    *(
        (adapter_kinds, name, "merged")
        for name in ("attention", "parameter", "experts", "conv3d", "transposed")
    ),
    *((shared_cases, name, "merged") for name in ("gpt2 both", "llama replicated", "two over one memory")),
    *(
        (shared_cases, name, "all")
        for name in ("gpt2 wte", "albert", "module in two places", "gpt2 tied adapters")
    ),
]


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize(("room", "name", "space"), CASES)
def test_points_are_losses_of_the_moved_model(room: Any, name: str, space: Any, stack: int) -> None:
    model, batch = room.make(name)
    loss = adapter_kinds.loss if room is adapter_kinds else shared_cases.on_logits
    given = Subject(model, [batch], loss, adapted_modules(model, []), seed=3)
    before = snapshot(model)["state"]
    found = landscape(given, points=3, distance=0.1, space=space, stack=stack)
    values = found.values()["value"].tolist()
    with in_space(given, space) as point, torch.no_grad():
        direction = random_direction(point, "filter", derive_seed(3, "slice", 0))
        expected = []
        for t in (-0.1, 0.0, 0.1):
            with point.moved(direction, t):
                expected.append(float(loss(model, batch)[0]))
    exact = 1e-5 if name.startswith("llama") else 1e-10
    assert values == pytest.approx(expected, rel=exact)
    assert expected[0] != pytest.approx(expected[1], rel=1e-4)
    assert same(before, snapshot(model)["state"])
