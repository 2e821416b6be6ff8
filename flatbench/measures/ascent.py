"""Projected gradient ascent with its own step sizes: the largest loss that it finds within a ball.

Croce and Hein, "Reliable evaluation of adversarial robustness", 2020, arXiv 2003.01690, Algorithm 1 (APGD),
as Andriushchenko et al. 2023 (arXiv 2302.07011) use it for sharpness.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flatbench.measures.balls import Ball
from flatbench.subject.objective import Objective

MOMENTUM = 0.75
#: a step size is halved if fewer than this share of the steps since the last checkpoint raised the loss
RISING = 0.75


@dataclass(frozen=True)
class Ascent:
    """The best point met: its loss, its coordinates in the ball, the step (0: the trained point itself)."""

    loss: float
    u: Tensor
    step: int
    gradients: int


def checkpoints(steps: int) -> list[int]:
    """The steps after which step sizes are looked at: shares 0, .22, then gaps that shrink to .06."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({math.ceil(share * steps - 1e-9) for share in shares[1:] if share <= 1})


def apgd(
    ball: Ball,
    objective: Objective,
    rho: float,
    steps: int,
    start: Tensor,
    trained: tuple[float, Sequence[Tensor]],
) -> Ascent:
    """Ascend within ``‖u‖ ≤ rho``; costs ``steps`` gradients, one fewer from the trained point.

    Args:
        start: coordinates to begin from.
        trained: loss and gradient at the trained point, which counts as met.
    """
    best = Ascent(trained[0], ball.zero(), 0, 0)
    gradients = 0

    def at(u: Tensor) -> tuple[float, Tensor]:
        nonlocal gradients
        if not bool(u.any()):
            return trained[0], ball.pulled(list(trained[1]))
        gradients += 1
        with ball.point.moved(ball.step(u)):
            loss, gradient = objective.gradient()
        return loss, ball.pulled(gradient)

    u = previous = start
    loss, slope = at(u)
    if loss > best.loss:
        best = Ascent(loss, u, 1, 0)
    best_slope, length = slope, 2 * rho
    marks, last_mark, rises, old = checkpoints(steps), 0, 0, (length, best.loss)
    for step in range(1, steps + 1):
        target = ball.project(u + length * ball.ascent(slope), rho)
        weight = 1.0 if step == 1 else MOMENTUM
        moved = ball.project(u + weight * (target - u) + (1 - weight) * (u - previous), rho)
        previous, u, before = u, moved, loss
        loss, slope = at(u)
        rises += loss > before
        if loss > best.loss:
            best, best_slope = Ascent(loss, u, step, 0), slope
        if step in marks:
            few = rises < RISING * (step - last_mark)
            stuck = old == (length, best.loss)
            old = (length, best.loss)
            if few or stuck:
                length /= 2
                u, loss, slope = best.u, best.loss, best_slope
                previous = u
            last_mark, rises = step, 0
    return Ascent(best.loss, best.u, best.step, gradients)
