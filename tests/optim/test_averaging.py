"""SWA and EMA: averages of the base optimizer's own path, at which the model is evaluated and saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.optim import EMA, SWA
from tests.optim.models import adapted, problem, snapshot, trainable


def path(model: nn.Module, steps: int) -> list[list[Tensor]]:
    """Weights after each step of the base optimizer alone."""
    base, closure = torch.optim.AdamW(trainable(model), lr=1e-2), problem(model)
    found = []
    for _ in range(steps):
        closure()
        base.step()
        found.append([p.detach().clone() for p in trainable(model)])
    return found


def trained(cls: Any, model: nn.Module, steps: int, **options: Any) -> Any:
    optimizer = cls(torch.optim.AdamW(trainable(model), lr=1e-2), model, **options)
    for _ in range(steps):
        optimizer.step(problem(model))
    return optimizer


def close(model: nn.Module, expected: list[Tensor]) -> None:
    for own, value in zip(trainable(model), expected, strict=True):
        torch.testing.assert_close(own.detach(), value)


def mean(points: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(values).mean(0) for values in zip(*points, strict=True)]


@pytest.mark.parametrize(
    ("start", "every", "which"), [(0.75, 1, [9, 10, 11]), (0.5, 3, [8, 11]), (0, 4, [3, 7, 11])]
)
def test_swa_is_the_mean_of_the_last_weights(start: float, every: int, which: list[int]) -> None:
    model = adapted()
    points = path(copy.deepcopy(model), 12)
    optimizer = trained(SWA, model, 12, start=start, every=every, total_steps=12)
    close(model, points[-1])
    optimizer.eval()
    close(model, mean([points[i] for i in which]))
    optimizer.train()
    close(model, points[-1])


def test_ema_is_the_moving_average() -> None:
    model = adapted()
    points = path(copy.deepcopy(model), 6)
    optimizer = trained(EMA, model, 6, decay=0.8)
    expected = points[0]
    for point in points[1:]:
        expected = [0.8 * e + 0.2 * p for e, p in zip(expected, point, strict=True)]
    optimizer.eval()
    close(model, expected)


def test_before_the_averaging_starts_the_weights_are_the_last_ones() -> None:
    model = adapted()
    points = path(copy.deepcopy(model), 3)
    optimizer = trained(SWA, model, 3, total_steps=100)
    optimizer.eval()
    close(model, points[-1])


def test_a_saved_state_is_the_average_and_training_goes_on_from_the_weights() -> None:
    model = adapted()
    points = path(copy.deepcopy(model), 5)
    optimizer = trained(EMA, model, 4, decay=0.5)
    stored = snapshot(model)
    optimizer.eval()
    assert all(torch.equal(stored[name], value) for name, value in snapshot(model).items())
    assert not torch.equal(trainable(model)[1], points[3][1])
    optimizer.step(problem(model))
    close(model, points[4])


@pytest.mark.parametrize(
    ("cls", "options", "word"),
    [
        (SWA, {}, "total_steps"),
        (SWA, {"start": 1.0, "total_steps": 3}, "start"),
        (SWA, {"every": 0, "total_steps": 3}, "every"),
        (EMA, {"decay": 1.5}, "decay"),
    ],
)
def test_bad_options(cls: Any, options: dict[str, Any], word: str) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=word):
        cls(torch.optim.SGD(trainable(model), lr=0.1), model, **options)
