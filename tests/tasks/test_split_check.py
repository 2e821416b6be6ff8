"""Splits of tasks from other packages: what overlaps, or depends on more than the seed, is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flatbench.errors import InputError
from flatbench.tasks.base import Splits
from flatbench.tasks.common.split_check import check_splits


class OfFunction:
    """A task, as far as the check asks."""

    def __init__(self, splits: Callable[[int], Splits]) -> None:
        self.splits = splits


def examples(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {"x": torch.tensor([float(i)]), "labels": torch.tensor(i % 2)} for i in range(start, start + count)
    ]


def apart(seed: int) -> Splits:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
    own = examples(0, 20)
    return Splits([own[i] for i in order[:10]], [own[i] for i in order[10:15]], [own[i] for i in order[15:]])


def overlapping(seed: int) -> Splits:
    return Splits(examples(0, 10), examples(10, 5), examples(8, 5))


def with_torch(seed: int) -> Splits:
    order = torch.randperm(10).tolist()
    return Splits([examples(0, 10)[i] for i in order], examples(10, 5), examples(15, 5))


def with_numpy(seed: int) -> Splits:
    return Splits(examples(0, 10), examples(10 + int(np.random.randint(1000)), 5), examples(5000, 5))


def with_random(seed: int) -> Splits:
    return Splits(examples(0, 10), examples(10, 5), examples(15 + random.randrange(1000), 5))


def check(splits: Callable[[int], Splits]) -> None:
    task: Any = OfFunction(splits)
    check_splits(task, 3)


def test_what_is_right_passes_and_leaves_the_random_states() -> None:
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr]
    check(apart)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_what_overlaps_is_refused() -> None:
    with pytest.raises(InputError, match="2 examples are in the splits train and test"):
        check(overlapping)


@pytest.mark.parametrize(
    ("splits", "part"), [(with_torch, "train"), (with_numpy, "validation"), (with_random, "test")]
)
def test_what_depends_on_global_random_states_is_refused(splits: Any, part: str) -> None:
    with pytest.raises(InputError, match=rf"two calls of splits\(3\) give different {part} examples"):
        check(splits)
