"""SAM sharpness: the rise of the loss within a small ball around the trained weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from flatbench.config.registry import LATER
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.measures.base import Measure
from flatbench.measures.options import checked
from flatbench.measures.sampling import (
    BUDGET,
    FORWARD,
    INTERVAL,
    Batches,
    Groups,
    Sampling,
    Taken,
    dealt,
    lift,
    measured,
    of_mean,
)
from flatbench.seeding import derive_seed
from flatbench.subject.objective import Objective, norm, rows
from flatbench.subject.rounding import rounding_errors, stated, told
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import Subject


class SAMSharpness(Measure):
    """Largest rise of the training loss found within an l2 ball of radius rho: a lower bound of the maximum.

    ``max_{‖ε‖₂ ≤ rho} L(w + ε) − L(w)`` (Foret et al. 2020, arXiv 2010.01412, Eq. 1), over the exact mean
    loss, by projected ascent along the normalised gradient. The first step is SAM's, ``ε = rho·g/‖g‖``; a
    step that finds nothing better is taken again from the best point with half its length. The best value
    ever seen counts, that at ε = 0 included, so the answer is never negative and never above the maximum.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        rho: radius of the ball over all parameters of the space together.
        steps: ascent steps, SAM's included; each costs one gradient.
        examples: use the first that many training examples; None for as many as ``interval`` asks for.
        interval: take more and more examples, drawn at random, until the sampling error is within this share
            of the sharpness; None for all examples.
        budget: of gradients of single examples, for the growing.
        every: also measure after every that many epochs of training, into the run's history.
        precision: ``float32``: a model in half precision is measured in float32, through a copy;
            ``as_stored``: as it is, where a small rise may be lost in rounding.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        rho: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05,
        steps: Annotated[int, Field(ge=1)] = 10,
        examples: Annotated[int, Field(ge=1)] | None = None,
        interval: Annotated[float, Field(gt=0, lt=1)] | None = INTERVAL,
        budget: Annotated[int, Field(ge=1)] = BUDGET,
        every: Annotated[int, Field(ge=1)] | None = None,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        checked(SAMSharpness, **given)
        self.space, self.rho, self.steps, self.every = space, rho, steps, every
        self.precision: Precision = precision
        self.sampling = Sampling(examples, interval, budget)

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``sharpness`` (the best rise found; a lower bound), ``sampling_error`` (half of a 95 % interval
            for all training examples; 0 where all were taken, None where too few to tell), ``one_step`` (the
            rise after SAM's single step, which can be negative; 0 where the gradient is zero), ``best_step``
            (the step that found the best, 0 for none), ``perturbation_norm`` (of the best ε), ``loss`` and
            ``gradient_norm`` at the trained point, ``rho``, ``steps``, ``gradients`` (of the mean loss over
            the last sample), ``examples``, ``example_gradients`` (of single examples, of all samples
            together), ``resolved`` (the sampling error is within ``interval``), ``rounding_error`` (of the
            rise, see `flatbench.subject.rounding`; where no step was found that raises the loss, of SAM's
            first), ``below_resolution`` (the rise cannot be told from 0), ``seconds``, ``space``,
            ``dimension``, ``precision``.

        Raises:
            NotApplicableError: the model has no such space.
            FlatbenchError: a loss is not finite.
        """
        start = time.perf_counter()
        with in_space(subject, self.space, precision=self.precision) as point:
            found = measured(subject.batches, self.sampling, partial(self._on, subject, point))
            return {**found, "seconds": time.perf_counter() - start, **point.describe()}

    def _on(self, subject: Subject, point: Point, batches: Batches, share: float) -> Taken:
        """Measure on some batches, which hold this share of all examples."""
        best, trained, length = self._ascent(subject, point, batches)
        rise, size = best.loss - trained, sum(map(rows, batches))
        error, passes = 0.0, float(self.steps)
        if share < 1:
            rises = Groups(replace(subject, batches=batches), point).rises(best.perturbation)
            halves = [self._ascent(subject, point, half) for half in dealt(batches, subject.seed, 2) if half]
            error = of_mean(rises, share)
            error += lift(rise, [ascent.loss - loss for ascent, loss, _ in halves], share)
            passes += self.steps + 2 / FORWARD
        tried = best.perturbation if best.step else best.first
        rounding = rounding_errors(subject.loss, point, batches, [lambda: tried])
        entries = {
            "sharpness": rise,
            "sampling_error": stated(error),
            "one_step": best.first_loss - trained if length else 0.0,
            "best_step": best.step,
            "perturbation_norm": norm(best.perturbation),
            "loss": trained,
            "gradient_norm": length,
            "rho": self.rho,
            "steps": self.steps,
            "gradients": self.steps,  # one at the point, one after every step but the last
            **told([rise], rounding, numbered=False),
        }
        return Taken(entries, [rise], [error], passes * size, rounding)

    def _ascent(self, subject: Subject, point: Point, batches: Batches) -> tuple[Ascent, float, float]:
        """The best point, the loss at the trained point, and the gradient's length there."""
        objective = Objective(replace(subject, batches=batches), point, None)
        loss, gradient = objective.gradient()
        length = norm(gradient)
        direction = gradient if length else _random(point, derive_seed(subject.seed, "sam_sharpness"))
        return ascend(point, objective, (loss, direction), self.rho, self.steps), loss, length


@dataclass(frozen=True)
class Ascent:
    """The best point of an ascent: its loss, its ε, the step that reached it; and the first step and loss."""

    loss: float
    perturbation: list[Tensor]
    step: int
    first_loss: float
    first: list[Tensor]


def ascend(
    point: Point, objective: Objective, start: tuple[float, Sequence[Tensor]], rho: float, steps: int
) -> Ascent:
    """Projected normalised gradient ascent from ε = 0, keeping the best: ``ε ← P(ε + η·g/‖g‖)``, η ≤ rho.

    ``P`` projects onto the ball ``‖ε‖₂ ≤ rho``.

    Args:
        start: the loss at ε = 0 and the direction of the first step, not zero.
    """
    best_loss, gradient = start
    best = [torch.zeros_like(part) for part in gradient]
    best_step, length, first_loss, first = 0, rho, best_loss, best
    for step in range(1, steps + 1):
        candidate = _project(best, gradient, length, rho)
        with point.moved(candidate):
            loss, new = objective.gradient() if step < steps else (objective.value(), gradient)
        if step == 1:
            first_loss, first = loss, candidate
        if loss > best_loss:
            best_loss, best, gradient, best_step = loss, candidate, new, step
        else:
            length /= 2
    return Ascent(best_loss, best, best_step, first_loss, first)


def _project(start: Sequence[Tensor], gradient: Sequence[Tensor], length: float, rho: float) -> list[Tensor]:
    """``start`` moved by ``length`` along the gradient, scaled back into the ball of radius ``rho``."""
    slope = norm(gradient)
    if slope == 0:  # a stationary point: there is nowhere to go
        return list(start)
    moved = [e + g * (length / slope) for e, g in zip(start, gradient, strict=True)]
    size = norm(moved)
    return [part * (rho / size) for part in moved] if size > rho else moved


def _random(point: Point, seed: int) -> list[Tensor]:
    """A direction to leave a stationary point by, where the gradient says nothing."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in point.parameters.values()]
