"""The directions that optimizers move in: the gradient, AdamW's update, and EFlat-LoRA's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from flatbench.curvature.operators.spaces import plain_name
from flatbench.errors import NotApplicableError
from flatbench.models import factors
from flatbench.optim.base.full_space import FullSpace
from flatbench.optim.moments import Moments, OptimizerState, of_optimizer
from flatbench.subject.objective import Objective, norm
from flatbench.subject.spaces import Point
from flatbench.subject.subject import Subject

#: ``gradient``: of the loss. ``adamw``: AdamW's update with that gradient. ``eflat_lora``: AdamW's update
#: with the gradient at EFlat-LoRA's perturbed point
Direction = Literal["gradient", "adamw", "eflat_lora"]
Rho = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Update:
    """A direction Δ of a step ``w ← w − η·Δ``.

    Attributes:
        parts: a tensor for each parameter of the space.
        loss, slope: the loss at the point, and ``⟨∇L, Δ⟩`` there; None where it was not taken there.
        guess: ``⟨g, Δ⟩`` with the gradient that Δ was made of.
        moments: where AdamW's moments come from; None for the gradient.
        gradients: how many were taken.
    """

    parts: list[Tensor]
    loss: float | None
    slope: float | None
    guess: float
    moments: str | None
    gradients: int


def state_of(subject: Subject, direction: Direction) -> OptimizerState | None:
    """The state of the optimizer that trains, or trained, the subject; None for the gradient.

    Asked for outside of a space, in which parameters may be others. Without a state, AdamW's first update
    from one gradient is what there is, and the result says so.

    Raises NotApplicableError for a live optimizer that is no Adam and no AdamW at its core.
    """
    if direction == "gradient":
        return None
    if subject.optimizer is not None:
        found = of_optimizer(subject.optimizer, subject.model)
        if found is None:
            raise NotApplicableError(
                f"{type(subject.optimizer).__name__} has no AdamW at its core; measure along 'gradient'"
            )
        return found
    saved = subject.optimizer_state() if subject.optimizer_state is not None else None
    return saved if saved is not None else OptimizerState()


def update_of(
    point: Point, objective: Objective, direction: Direction, state: OptimizerState | None, rho: float
) -> Update:
    """The update that a direction stands for, at a point.

    Args:
        state: what `state_of` gave.
        rho: radius of EFlat-LoRA's perturbation, where the state has no average.

    Raises NotApplicableError where the optimizer does not move the space's parameters, or not at all.
    """
    if direction == "gradient":
        loss, parts = objective.gradient()
        slope = norm(parts) ** 2
        return _moving(Update(parts, loss, slope, slope, None, 1))
    assert state is not None
    moments = _by_parameter(point, state)
    source = state.source
    if direction == "adamw":
        loss, gradient = objective.gradient()
        parts = _updates(point, moments, gradient)
        slope = _product(gradient, parts)
        return _moving(Update(parts, loss, slope, slope, source, 1))
    loss_here, perturbation, taken = _perturbation(point, objective, state, rho)
    with point.moved(perturbation):
        _, gradient = objective.gradient()
    parts = _updates(point, moments, gradient)
    return _moving(Update(parts, loss_here, None, _product(gradient, parts), source, taken + 1))


def _moving(update: Update) -> Update:
    if norm(update.parts) == 0:
        raise NotApplicableError("the update is zero: the point is stationary")
    return update


def _by_parameter(point: Point, state: OptimizerState) -> list[Moments]:
    """The moments of each parameter of the space."""
    if not state.moments:
        return [Moments() for _ in point.parameters]
    known = {plain_name(name): moments for name, moments in state.moments.items()}
    missing = [n for n in point.parameters if plain_name(n) not in known]
    if missing:
        raise NotApplicableError(
            f"the optimizer does not move {plain_name(missing[0])}, which is in the space '{point.space}'; "
            "measure in the space that it trains ('adapter' for LoRA)"
        )
    return [known[plain_name(name)] for name in point.parameters]


@torch.no_grad()
def _updates(point: Point, moments: Sequence[Moments], gradient: Sequence[Tensor]) -> list[Tensor]:
    trios = zip(moments, gradient, point.parameters.values(), strict=True)
    return [m.update(g, p.detach().to(g)) for m, g, p in trios]


def _perturbation(
    point: Point, objective: Objective, state: OptimizerState, rho: float
) -> tuple[float | None, list[Tensor], int]:
    """The loss at the point if it was taken, EFlat-LoRA's perturbation there, and the gradients it took.

    The optimizer's own Ê where there is one; else E of the gradient at the point (arXiv 2508.00522, Eq. 10
    to 15).
    """
    if point.space != "adapter" or not factors.measured_factors(point.model):
        raise NotApplicableError("EFlat-LoRA moves the factors of LoRA; measure in the space 'adapter'")
    full = FullSpace(point.model, "eflat_lora", "B")
    loss: float | None = None
    taken, values = 0, state.average
    if values is None:
        loss, gradient = objective.gradient()
        taken = 1
        for parameter, part in zip(point.parameters.values(), gradient, strict=True):
            parameter.grad = part.to(parameter.dtype)  # the space puts gradients back on the way out
        values, _ = full.perturbation(rho, "average", "global")
        for parameter in point.parameters.values():
            parameter.grad = None
    added = {id(weight): value for weight, value in zip(full.weights, values, strict=True)}
    return loss, [added.get(id(p), torch.zeros_like(p)).to(p) for p in point.parameters.values()], taken


def _product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))
