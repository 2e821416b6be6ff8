"""Critical sharpness: the curvature along an update, from the smallest step that raises the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from flatbench.config.registry import LATER
from flatbench.curvature.estimates.probes import student
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.precision import Precision, half_types, why_coarse
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import FlatbenchError
from flatbench.measures.base import Measure, Track
from flatbench.measures.line_search import Crossing, first_rise
from flatbench.measures.options import checked
from flatbench.measures.sampling import FORWARD
from flatbench.measures.updates import Direction, Rho, Update, state_of, update_of
from flatbench.subject.objective import Objective, norm, rows, weighted_mean
from flatbench.subject.rounding import rounding_errors, stated
from flatbench.subject.spaces import Point, in_space, moved
from flatbench.subject.subject import Subject

#: the first step lowers the loss by this share of it, if the line is as steep as at its start
FIRST = 0.02
#: forward passes over the examples that a value may cost, the one at the point itself included
PASSES = 8
TOLERANCE = 1 / 16

#: each batch's mean loss and its terms
Losses = Sequence[tuple[float, int]]


class CriticalSharpness(Measure):
    """Critical sharpness: 2/η_c, with η_c the smallest step along an update that raises the loss.

    arXiv 2601.16979: ``λ_c = 2/η_c``, ``η_c = min{η > 0 : L(θ − η·Δ) > L(θ)}`` with Δ the optimizer's update,
    from forward passes alone. Where the loss is quadratic along the line it is ``ΔᵀHΔ/⟨g, Δ⟩``; for the
    gradient ``gᵀHg/gᵀg``, which is at most the largest eigenvalue. A line search can pass over a rise that is
    narrower than its steps.

    Args:
        space: the parameters that move: ``merged`` (the full weights of the adapted modules), ``adapter`` (A
            and B) or ``all``.
        direction: ``gradient``; ``adamw``: AdamW's next update, with the moments of the optimizer that trains
            the model now, or of its saved state, or, where there is neither, of this one gradient; or
            ``eflat_lora``: AdamW's update with the gradient at EFlat-LoRA's perturbed point. The last two
            move what the optimizer trains: ``adapter``, or ``all`` without an adapter.
        rho: radius of EFlat-LoRA's perturbation, where no optimizer has an average of them.
        examples: the first that many training examples.
        tolerance: the bracket of η_c that ends the search: its ends differ by this share.
        passes: forward passes over the examples after which it ends as well.
        every: also measure after every that many epochs of training, into the run's history.
        precision: ``float32``: a model in half precision is measured in float32, through a copy;
            ``as_stored``: as it is.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        direction: Direction = "gradient",
        rho: Rho = 0.05,
        examples: Annotated[int, Field(ge=1)] = 1024,
        tolerance: Annotated[float, Field(gt=0, lt=1)] = TOLERANCE,
        passes: Annotated[int, Field(ge=3)] = PASSES,
        every: Annotated[int, Field(ge=1)] | None = None,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        checked(type(self), **given)
        self.space, self.direction, self.rho, self.examples = space, direction, rho, examples
        self.tolerance, self.passes, self.every = tolerance, passes, every
        self.precision: Precision = precision

    @staticmethod
    def gradients(measure: Any, train: int) -> float:
        """What it costs, in gradients of single examples."""
        return min(measure.get("examples") or 1024, train) * (2 + (measure.get("passes") or PASSES) / FORWARD)

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``critical_sharpness`` (2/η_c; None where no bracket was found), ``lower_bound`` and
            ``upper_bound`` (2/η at the ends of the bracket; steps whose rise rounding could have turned count
            for neither; None without an upper end), ``critical_lr`` (η_c), ``converged`` (the bracket is
            within ``tolerance``), ``rises_at_once`` (the update is no descent: every step raises the loss, as
            far as was seen), ``slope`` (``⟨g, Δ⟩``, None where it was not taken), ``direction``, ``moments``
            (of AdamW: ``live optimizer``, ``saved state`` or ``one gradient``), ``direction_norm``, ``loss``,
            ``forward_passes`` (over all examples), ``gradients`` (the update's), ``sampling_error`` (half a
            95 % interval for all training examples along this direction, from the batches; 0 where all were
            taken, None where too few to tell), ``rounding_error`` (of critical_sharpness, see
            `flatbench.subject.rounding`, on at most 16 examples), ``examples``, ``seconds``, ``space``,
            ``dimension``, ``precision``.

        Raises:
            NotApplicableError: the model has no such space, the update is zero, or is not known.
            FlatbenchError: the loss is not finite.
        """
        return self.during(subject, Track())

    def during(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Measure, beginning with the step at which an earlier measurement ended."""
        start = time.perf_counter()
        state = state_of(subject, self.direction)
        with in_space(subject, self.space, precision=self.precision) as point:
            objective = Objective(subject, point, self.examples)
            update = update_of(point, objective, self.direction, state, self.rho)
            share = objective.examples / sum(map(rows, subject.batches))
            found = self._along(subject, point, objective, update, track, share)
            return {
                "critical_sharpness": None,
                **found,
                "direction": self.direction,
                "moments": update.moments,
                "direction_norm": norm(update.parts),
                "gradients": update.gradients,
                "examples": objective.examples,
                "seconds": time.perf_counter() - start,
                **point.describe(),
            }

    def _along(
        self,
        subject: Subject,
        point: Point,
        objective: Objective,
        update: Update,
        track: Track,
        share: float,
    ) -> dict[str, Any]:
        """Search the loss of ``objective``, which holds this share of its examples, along an update."""
        line = _Line(subject, point, objective, update.parts)
        slope = update.slope
        first = None if track.vectors is None else float(track.vectors)
        crossing = line.search(first, slope, update.guess, self.tolerance, self.passes)
        tried = crossing.above if math.isfinite(crossing.above) else crossing.below
        rounding = math.inf
        if tried:
            move = [part * -tried for part in update.parts]
            (rounding,) = rounding_errors(line.loss, point, objective.batches, [lambda: move])
        found = _entries(crossing, rounding, self.tolerance)
        if crossing.step is not None:
            track.vectors = torch.tensor([[crossing.step]], dtype=torch.float64)
        return {
            **found,
            "slope": slope,
            "loss": line.at_rest,
            "forward_passes": line.passes,
            "sampling_error": stated(line.sampling_error(crossing, share)),
        }


def critical_sharpness(
    loss: Callable[[], float],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    *,
    start: float | None = None,
    slope: float | None = None,
    tolerance: float = TOLERANCE,
    passes: int = PASSES,
) -> dict[str, Any]:
    """Critical sharpness of any loss along any direction, with forward passes alone (arXiv 2601.16979).

    With another loss than the one that the direction descends, it is the relative critical sharpness. The
    parameters hold afterwards the bits of before.

    Args:
        loss: gives the loss at the weights as they are; the same examples, and no dropout, each time.
        parameters: what moves.
        direction: Δ of the step ``w − η·Δ``, a tensor for each parameter, such as its gradient.
        start: the first step; where the loss would fall by 2 % if None and ``slope`` is given, else a
            thousandth of the weights' length.
        slope: ``⟨∇L, Δ⟩``, if it is known: spares a pass or two.

    Returns:
        ``critical_sharpness``, ``lower_bound``, ``upper_bound``, ``critical_lr``, ``converged``,
        ``rises_at_once``, ``loss``, ``forward_passes``, as the measure `CriticalSharpness` has them; rounding
        is not looked at.

    Raises FlatbenchError if the loss at the weights is not finite.
    """
    with torch.no_grad():
        at_rest = float(loss())
        if not math.isfinite(at_rest):
            raise FlatbenchError(f"the loss is {at_rest}")
        calls = 1

        def rise(step: float) -> float:
            nonlocal calls
            calls += 1
            with moved(parameters, direction, -step):
                value = float(loss())
            return value - at_rest if math.isfinite(value) else math.inf

        first = start or _first_step(at_rest, slope, parameters, direction)
        found = first_rise(rise, first, slope=slope, tolerance=tolerance, tries=passes - 1)
    entries = _entries(found, 0.0, tolerance)
    entries.pop("rounding_error")
    return {**entries, "loss": at_rest, "forward_passes": calls}


class _Line:
    """The loss of some batches along a direction."""

    def __init__(
        self, subject: Subject, point: Point, objective: Objective, direction: Sequence[Tensor]
    ) -> None:
        self.loss, self.point, self.direction = subject.loss, point, direction
        self._batches = objective.batches
        self.passes = 0
        self._here = self._losses()
        self.at_rest = weighted_mean(self._here)
        if not math.isfinite(self.at_rest):
            raise FlatbenchError(f"the loss is {self.at_rest}{why_coarse(half_types(point.model))}")
        self._losses_by_step: dict[float, Losses] = {}

    def _losses(self) -> Losses:
        self.passes += 1
        with torch.no_grad(), losses_in_float32(self.point.model):
            found = [self.loss(self.point.model, batch) for batch in self._batches]
        return [(float(loss), terms) for loss, terms in found]

    def _rise(self, step: float) -> float:
        with self.point.moved(self.direction, -step):
            self._losses_by_step[step] = self._losses()
        value = weighted_mean(self._losses_by_step[step])
        return value - self.at_rest if math.isfinite(value) else math.inf

    def search(
        self, first: float | None, slope: float | None, guess: float, tolerance: float, passes: int
    ) -> Crossing:
        """Bracket the first rise. ``first``: the step of an earlier search; ``guess``: about the slope."""
        start = first or _first_step(
            self.at_rest, guess, list(self.point.parameters.values()), self.direction
        )
        return first_rise(self._rise, start, slope=slope, tolerance=tolerance, tries=passes - 1)

    def sampling_error(self, found: Crossing, share: float) -> float:
        """Half a 95 % interval of 2/η_c over batches: that of the rise at η_c over its slope there."""
        if share >= 1:
            return 0.0
        if found.step is None:
            return math.inf
        near = min(self._losses_by_step, key=lambda step: abs(math.log(step / found.step)))  # type: ignore[operator]
        pairs = zip(self._here, self._losses_by_step[near], strict=True)
        rises = [b - a for (a, _), (b, terms) in pairs if terms]
        steepness = _steepness(found)
        if len(rises) < 2 or steepness <= 0 or not all(map(math.isfinite, rises)):
            return math.inf
        error = student(len(rises)) * stdev(rises) / math.sqrt(len(rises)) * math.sqrt(1 - share)
        return 2 / found.step**2 * error / steepness


def _first_step(
    loss: float, slope: float | None, parameters: Sequence[Tensor], direction: Sequence[Tensor]
) -> float:
    if slope is not None and slope and loss:
        return FIRST * abs(loss / slope)
    return 1e-3 * (norm([p.detach() for p in parameters]) or 1.0) / norm(direction)


def _steepness(found: Crossing) -> float:
    """The slope of the loss where it crosses: that of the chord over the bracket."""
    return (found.rises[found.above] - found.rises[found.below]) / (found.above - found.below)


def _entries(found: Crossing, rounding: float, tolerance: float) -> dict[str, Any]:
    """The entries of a result that a search gives, with rises of which rounding hides the sign left out."""
    known = math.isfinite(rounding)
    trusted = found.trusted(rounding) if known else found
    step = trusted.step
    error: float | None = None
    if step is not None:
        steepness = _steepness(trusted)
        error = 2 / step**2 * rounding / steepness if known and steepness > 0 else None
    at_once = found.slope is not None and found.slope <= 0
    finite = math.isfinite(trusted.above)
    return {
        "critical_sharpness": None if step is None else 2 / step,
        "lower_bound": 2 / trusted.above if finite else 0.0,
        "upper_bound": 2 / trusted.below if trusted.below else None,
        "critical_lr": 0.0 if at_once else step,
        "converged": step is not None and trusted.above <= trusted.below * (1 + tolerance),
        "rises_at_once": at_once or (finite and not trusted.below),
        "rounding_error": error,
    }
