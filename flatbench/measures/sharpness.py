"""Worst-case and average-case sharpness within a ball around the trained weights, over a grid of radii."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.config.registry import LATER
from flatbench.curvature.operators.batches import chosen
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import NotApplicableError
from flatbench.measures.ascent import Ascent, apgd
from flatbench.measures.balls import Ball, Metric, Norm
from flatbench.measures.base import Measure
from flatbench.measures.gauge import balanced
from flatbench.measures.options import checked
from flatbench.measures.sampling import (
    BUDGET,
    FIRST,
    FORWARD,
    GROUPS,
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
from flatbench.subject.objective import Objective, rows
from flatbench.subject.rounding import rounding_errors, stated, told
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import LossFunction, Subject


class Sharpness(Measure):
    """Rise of the training loss within a ball: the worst that an ascent finds, or the average.

    Andriushchenko et al. 2023 (arXiv 2302.07011): per batch of m examples, then averaged (m-sharpness). The
    worst case is a lower bound of the maximum, by APGD from the trained point and from random points.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        kind: ``worst`` case or ``average`` case.
        norm: of the ball, ``l2`` or ``linf``; of the average's noise, Gaussian or uniform.
        metric: ``plain``, ``adaptive`` (scaled by ``|w|``) or ``invariant`` (LoRA's GL(r)-invariant metric:
            ``adapter`` space, l2).
        gauge: ``as_is``, or ``balanced`` (BᵀB = AAᵀ) before measuring; the invariant metric implies it.
        rho: radii; those that make sense depend on norm and metric.
        steps: of an ascent; each costs one gradient.
        restarts: ascents; the first from the trained point, others from random points of the ball.
        samples: antithetic pairs of perturbations for the average.
        floor: of adaptive scales, relative to the weights' root mean square, so that zero weights move; of
            the invariant metric's damping.
        m: examples per batch; None takes all together, of which a sample's sharpness is lifted most.
        normalise_logits: centre each example's logits and divide them by their norm first.
        examples: use the first that many training examples; None for as many as ``interval`` asks for.
        interval: take more and more examples, drawn at random, until the sampling error at every radius is
            within this share of the sharpness; None for all examples.
        budget: of gradients of single examples, for the growing.
        precision: ``float32``: a model in half precision is measured in float32, through a copy;
            ``as_stored``: as it is, where a small rise may be lost in rounding.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        kind: Literal["worst", "average"] = "worst",
        norm: Norm = "l2",
        metric: Metric = "plain",
        gauge: Literal["as_is", "balanced"] = "as_is",
        rho: Annotated[Sequence[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)] = (
            0.05,
            0.2,
        ),
        steps: Annotated[int, Field(ge=1)] = 20,
        restarts: Annotated[int, Field(ge=1)] = 1,
        samples: Annotated[int, Field(ge=2)] = 10,
        floor: Annotated[float, Field(ge=0, lt=1)] = 0.01,
        m: Annotated[int, Field(ge=1)] | None = 128,
        normalise_logits: bool = False,
        examples: Annotated[int, Field(ge=1)] | None = None,
        interval: Annotated[float, Field(gt=0, lt=1)] | None = INTERVAL,
        budget: Annotated[int, Field(ge=1)] = BUDGET,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        checked(Sharpness, **given)
        self.space, self.kind, self.norm, self.metric, self.gauge = space, kind, norm, metric, gauge
        self.rho, self.steps, self.restarts, self.samples = list(rho), steps, restarts, samples
        self.floor, self.m, self.normalise_logits = floor, m, normalise_logits
        self.precision: Precision = precision
        self.sampling = Sampling(examples, interval, budget, first=max(FIRST, m or 0))

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            For each radius i: ``sharpness_i``, ``rho_i`` and ``sampling_error_i`` (half of a 95 % interval
            for all training examples; 0 where all were taken, None where too few to tell); worst case:
            ``best_step_i`` (median over batches of the step that found it); average: ``standard_error_i`` (of
            the mean over perturbations). ``sharpness`` and ``sampling_error`` are those of the first radius;
            ``loss`` at the trained point; ``gradients`` (of batches, in the last sample), ``batches``,
            ``examples``, ``example_gradients`` (of single examples, of all samples together), ``resolved``
            (every sampling error is within ``interval``); ``rounding_error_i`` (of the first batch's rise, at
            two perturbations of the average; see `flatbench.subject.rounding`) and ``below_resolution_i``
            (the rise cannot be told from 0), those of the first radius without a number too; ``seconds``,
            ``kind``, ``norm``, ``metric``, ``gauge``, ``space``, ``dimension``, ``precision``.

        Raises:
            NotApplicableError: the model has no such space, metric or gauge, or logits cannot be normalised.
            FlatbenchError: a loss is not finite.
        """
        start = time.perf_counter()
        if self.normalise_logits:
            subject = replace(subject, loss=on_normalised_logits(subject.loss))
        gauge = "balanced" if self.metric == "invariant" else self.gauge
        with in_space(subject, self.space, precision=self.precision) as point, _in_gauge(point, gauge):
            ball = Ball(point, self.metric, self.norm, self.floor)

            def take(batches: Batches, share: float) -> Taken:
                parts = self._parts(subject, point, batches)
                run = self._worst if self.kind == "worst" else self._average
                return run(ball, parts, derive_seed(subject.seed, "sharpness"), share)

            return {
                **measured(subject.batches, self.sampling, take),
                "seconds": time.perf_counter() - start,
                "kind": self.kind,
                "norm": self.norm,
                "metric": self.metric,
                "gauge": gauge,
                "normalise_logits": self.normalise_logits,
                **point.describe(),
            }

    def _parts(self, subject: Subject, point: Point, batches: Batches) -> list[_Part]:
        parts = [list(batches)] if self.m is None else dealt_in_turn(batches, self.m)
        return [_Part(replace(subject, batches=part), point) for part in parts]

    def _worst(self, ball: Ball, parts: Sequence[_Part], seed: int, share: float) -> Taken:
        found, errors, passes = _Radii(parts), [], 1.0
        for i, rho in enumerate(self.rho, start=1):
            best = [
                self._ascents(ball, part, rho, partial(derive_seed, seed, i, j))
                for j, part in enumerate(parts)
            ]
            rise = _weighted_mean(
                [end.loss - part.loss for end, part in zip(best, parts, strict=True)], parts
            )
            found.gradients += sum(end.gradients for end in best)
            passes += self.steps * self.restarts
            error = 0.0
            if share < 1:
                rises = found.rises_by_group(ball, [end.u for end in best])
                error = of_mean(rises, share, found.weights())
                passes += 1 / FORWARD
                if len(parts) == 1:  # every example takes part in the choice of the perturbation
                    halves = parts[0].halves()
                    ends = [
                        self._ascents(ball, half, rho, partial(derive_seed, seed, i, 0)) for half in halves
                    ]
                    rises = [end.loss - half.loss for end, half in zip(ends, halves, strict=True)]
                    error += lift(rise, rises, share) if rises else math.inf
                    passes += self.steps * self.restarts
            errors.append(error)
            found.tried(self._perturbation_of(ball, parts[0], best[0], rho))
            found.add(i, rho, rise, error, best_step=sorted(end.step for end in best)[len(best) // 2])
        return found.taken(ball, errors, passes)

    def _perturbation_of(self, ball: Ball, part: _Part, end: Ascent, rho: float) -> list[Tensor]:
        """The best perturbation of a part, or the first step where none raised the loss."""
        if bool(end.u.any()):
            return [end.u]
        slope = ball.pulled(list(part.gradient))
        return [ball.project(2 * rho * ball.ascent(slope), rho)]

    def _ascents(self, ball: Ball, part: _Part, rho: float, seed: Callable[[int], int]) -> Ascent:
        """The best of the ascents on a batch, with the gradients of all."""
        starts = [ball.zero()] + [ball.inside(rho, seed(restart)) for restart in range(1, self.restarts)]
        if not any(bool(g.any()) for g in part.gradient):  # stationary: any direction will do
            starts[0] = ball.inside(rho, seed(0))
        ends = [apgd(ball, part.objective, rho, self.steps, u, part.trained) for u in starts]
        best = max(ends, key=lambda end: end.loss)
        return replace(best, gradients=sum(end.gradients for end in ends))

    def _average(self, ball: Ball, parts: Sequence[_Part], seed: int, share: float) -> Taken:
        found, errors, passes = _Radii(parts), [], 1 / FORWARD
        for i, rho in enumerate(self.rho, start=1):
            rises, by_group = [], []
            for sample in range(self.samples):
                u = ball.drawn(rho, derive_seed(seed, i, sample))
                both = []
                for sign in (1, -1):
                    with ball.point.moved(ball.step(u), sign):
                        changes = [part.objective.value() - part.loss for part in parts]
                        both.append(_weighted_mean(changes, parts))
                rises.append(fmean(both))
                if share < 1:
                    by_group += [found.rises_by_group(ball, [sign * u] * len(parts)) for sign in (1, -1)]
            passes += 2 * self.samples * (2 if share < 1 else 1) / FORWARD
            error = 0.0
            if share < 1:
                means = [fmean(column) for column in zip(*by_group, strict=True)]
                error = of_mean(means, share, found.weights())
            errors.append(error)
            u = ball.drawn(rho, derive_seed(seed, i, 0))
            found.tried([u, -u])
            spread = stdev(rises) / math.sqrt(len(rises))
            found.add(i, rho, fmean(rises), error, standard_error=spread)
        return found.taken(ball, errors, passes)


class _Part:
    """A batch of examples whose rise is looked at together; made at the trained point."""

    def __init__(self, subject: Subject, point: Point) -> None:
        self.subject, self.point = subject, point
        self.objective = Objective(subject, point, None)
        self.weight = self.objective.examples
        self.trained = self.objective.gradient()
        self.loss, self.gradient = self.trained

    @functools.cached_property
    def groups(self) -> Groups:
        """Its examples in groups; asked for at the trained point."""
        return Groups(self.subject, self.point)

    def halves(self) -> list[_Part]:
        """Its examples in two halves; none where it has but one."""
        found = dealt(self.subject.batches, self.subject.seed, 2)
        if not all(found):
            return []
        return [_Part(replace(self.subject, batches=half), self.point) for half in found]


class _Radii:
    """What is found at each radius."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts, self.entries, self.gradients = parts, dict[str, Any](), len(parts)
        self._perturbations: list[list[Tensor]] = []

    def tried(self, at: list[Tensor]) -> None:
        """Perturbations of a radius at which rounding is looked at, in the first part."""
        self._perturbations.append(at)

    def add(self, i: int, rho: float, rise: float, error: float, **others: float) -> None:
        """Entries of the i-th radius."""
        self.entries |= {
            f"sharpness_{i}": rise,
            f"rho_{i}": rho,
            f"sampling_error_{i}": stated(error),
            **{f"{key}_{i}": value for key, value in others.items()},
        }

    def rises_by_group(self, ball: Ball, at: Sequence[Tensor]) -> list[float]:
        """The rises at the parts' perturbations: a part each where they are many, else a group each."""
        rises = [part.groups.rises(ball.step(u)) for part, u in zip(self.parts, at, strict=True)]
        if len(self.parts) >= GROUPS:
            return [fmean(each) for each in rises]
        return [rise for each in rises for rise in each]

    def weights(self) -> list[float]:
        """What `rises_by_group` weigh in the mean over all examples."""
        if len(self.parts) >= GROUPS:
            return [float(part.weight) for part in self.parts]
        return [weight for part in self.parts for weight in part.groups.weights]

    def rounding(self, ball: Ball) -> list[float]:
        """The error by rounding at each radius."""
        first, steps = self.parts[0], [u for at in self._perturbations for u in at]
        found = iter(
            rounding_errors(
                first.subject.loss,
                first.point,
                first.subject.batches,
                [functools.partial(ball.step, u) for u in steps],
            )
        )
        return [fmean([next(found) for _ in at]) for at in self._perturbations]

    def taken(self, ball: Ball, errors: Sequence[float], passes: float) -> Taken:
        """All radii, and their cost in passes over the examples."""
        values = [self.entries[f"sharpness_{i}"] for i in range(1, len(errors) + 1)]
        rounding = self.rounding(ball)
        first = {"sharpness": self.entries["sharpness_1"], "sampling_error": self.entries["sampling_error_1"]}
        entries = {
            **first,
            **told(values[:1], rounding[:1], numbered=False),
            **self.entries,
            **told(values, rounding),
            "loss": _weighted_mean([part.loss for part in self.parts], self.parts),
            "gradients": self.gradients,
            "batches": len(self.parts),
        }
        return Taken(entries, values, errors, passes * sum(part.weight for part in self.parts), rounding)


def _weighted_mean(values: Sequence[float], parts: Sequence[_Part]) -> float:
    total = sum(part.weight for part in parts)
    return sum(value * part.weight for value, part in zip(values, parts, strict=True)) / total


@contextlib.contextmanager
def _in_gauge(point: Point, gauge: str) -> Iterator[None]:
    with balanced(point) if gauge == "balanced" else contextlib.nullcontext():
        yield


def dealt_in_turn(batches: Batches, size: int) -> list[list[Mapping[str, Tensor]]]:
    """The examples in their order, ``size`` at a time; the last part holds what is left."""
    found: list[list[Mapping[str, Tensor]]] = []
    room = 0
    for batch in batches:
        count, offset = rows(batch), 0
        while offset < count:
            if not room:
                found.append([])
                room = size
            end = min(offset + room, count)
            found[-1].append(chosen(batch, slice(offset, end)))
            room -= end - offset
            offset = end
    return found


def on_normalised_logits(loss: LossFunction) -> LossFunction:
    """The cross entropy of logits that are centred and divided by their norm, an example at a time.

    Raises NotApplicableError, when it is called, for a model whose loss is not the cross entropy of its
    logits.
    """

    def normalised(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        labels = batch.get("labels")
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            raise NotApplicableError("logits are normalised for classifiers with one label an example only")
        logits = model(**batch).logits
        with torch.no_grad():
            plain, terms = loss(model, batch)
            own = nn.functional.cross_entropy(logits, labels)
        if not torch.isclose(plain, own.to(plain), rtol=1e-3, atol=1e-5):
            raise NotApplicableError("the task's loss is not the cross entropy of the logits")
        centred = logits - logits.mean(dim=-1, keepdim=True)
        return nn.functional.cross_entropy(nn.functional.normalize(centred, dim=-1), labels), terms

    return normalised
