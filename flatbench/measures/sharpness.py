"""Worst-case and average-case sharpness within a ball around the trained weights, over a grid of radii."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import NotApplicableError
from flatbench.measures.ascent import apgd
from flatbench.measures.balls import Ball, Metric, Norm
from flatbench.measures.base import Measure
from flatbench.measures.gauge import balanced
from flatbench.measures.options import checked
from flatbench.seeding import derive_seed
from flatbench.subject.objective import Objective, first_examples, rows
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
        metric: ``plain``, ``adaptive`` (scaled by |w|) or ``invariant`` (LoRA's GL(r)-invariant metric:
            ``adapter`` space, l2).
        gauge: ``as_is``, or ``balanced`` (BᵀB = AAᵀ) before measuring; the invariant metric implies it.
        rho: radii; those that make sense depend on norm and metric.
        steps: of an ascent; each costs one gradient.
        restarts: ascents; the first from the trained point, others from random points of the ball.
        samples: antithetic pairs of perturbations for the average.
        floor: of adaptive scales, relative to the weights' root mean square, so that zero weights move; of
            the invariant metric's damping.
        m: examples per batch; None takes all together.
        normalise_logits: centre each example's logits and divide them by their norm first.
        examples: use only the first that many training examples; None for all.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        kind: Literal["worst", "average"] = "worst",
        norm: Norm = "l2",
        metric: Metric = "plain",
        gauge: Literal["as_is", "balanced"] = "as_is",
        rho: Sequence[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = (0.05, 0.2),
        steps: Annotated[int, Field(ge=1)] = 20,
        restarts: Annotated[int, Field(ge=1)] = 1,
        samples: Annotated[int, Field(ge=2)] = 10,
        floor: Annotated[float, Field(ge=0, lt=1)] = 0.01,
        m: Annotated[int, Field(ge=1)] | None = 128,
        normalise_logits: bool = False,
        examples: Annotated[int, Field(ge=1)] | None = 1024,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        checked(Sharpness, **given)
        self.space, self.kind, self.norm, self.metric, self.gauge = space, kind, norm, metric, gauge
        self.rho, self.steps, self.restarts, self.samples = list(rho), steps, restarts, samples
        self.floor, self.m, self.normalise_logits, self.examples = floor, m, normalise_logits, examples

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            For each radius i: ``sharpness_i`` and ``rho_i``; worst case: ``best_step_i`` (median over batches
            of the step that found it); average: ``standard_error_i``. ``sharpness`` is that of the first
            radius; ``loss`` at the trained point; ``gradients``, ``seconds``, ``batches``, ``examples``,
            ``kind``, ``norm``, ``metric``, ``gauge``, ``space``, ``dimension``, ``precision``.

        Raises:
            NotApplicableError: the model has no such space, metric or gauge, or logits cannot be normalised.
            FlatbenchError: a loss is not finite.
        """
        start = time.perf_counter()
        if self.normalise_logits:
            subject = replace(subject, loss=on_normalised_logits(subject.loss))
        gauge = "balanced" if self.metric == "invariant" else self.gauge
        with in_space(subject, self.space) as point, _in_gauge(point, gauge):
            objectives = self._objectives(subject, point)
            ball = Ball(point, self.metric, self.norm, self.floor)
            run = self._worst if self.kind == "worst" else self._average
            found = run(ball, objectives, derive_seed(subject.seed, "sharpness"))
            return {
                **found,
                "seconds": time.perf_counter() - start,
                "batches": len(objectives),
                "examples": sum(each.objective.examples for each in objectives),
                "kind": self.kind,
                "norm": self.norm,
                "metric": self.metric,
                "gauge": gauge,
                "normalise_logits": self.normalise_logits,
                **point.describe(),
            }

    def _objectives(self, subject: Subject, point: Point) -> list[_Part]:
        batches = first_examples(subject.batches, self.examples)
        groups = [batches] if self.m is None else [[part] for batch in batches for part in cut(batch, self.m)]
        found = []
        for group in groups:
            objective = Objective(replace(subject, batches=group), point, None)
            found.append(_Part(objective, objective.gradient(), sum(map(rows, group))))
        return found

    def _worst(self, ball: Ball, parts: Sequence[_Part], seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        gradients = len(parts)
        for i, rho in enumerate(self.rho, start=1):
            best = []
            for j, part in enumerate(parts):
                starts = [ball.zero()] + [
                    ball.inside(rho, derive_seed(seed, i, j, restart)) for restart in range(1, self.restarts)
                ]
                if not any(bool(g.any()) for g in part.trained[1]):  # stationary: any direction will do
                    starts[0] = ball.inside(rho, derive_seed(seed, i, j, 0))
                ends = [apgd(ball, part.objective, rho, self.steps, u, part.trained) for u in starts]
                gradients += sum(end.gradients for end in ends)
                best.append(max(ends, key=lambda end: end.loss))
            rises = [end.loss - part.trained[0] for end, part in zip(best, parts, strict=True)]
            found[f"sharpness_{i}"] = _weighted_mean(rises, parts)
            found[f"rho_{i}"] = rho
            found[f"best_step_{i}"] = sorted(end.step for end in best)[len(best) // 2]
        return _add_headline(found, parts, gradients)

    def _average(self, ball: Ball, parts: Sequence[_Part], seed: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, rho in enumerate(self.rho, start=1):
            rises = []
            for sample in range(self.samples):
                u = ball.drawn(rho, derive_seed(seed, i, sample))
                both = []
                for sign in (1, -1):
                    with ball.point.moved(ball.step(u), sign):
                        changes = [part.objective.value() - part.trained[0] for part in parts]
                        both.append(_weighted_mean(changes, parts))
                rises.append(fmean(both))
            found[f"sharpness_{i}"] = fmean(rises)
            found[f"rho_{i}"] = rho
            found[f"standard_error_{i}"] = stdev(rises) / math.sqrt(len(rises))
        return _add_headline(found, parts, len(parts))


@dataclass(frozen=True)
class _Part:
    """A batch's objective with its loss and gradient at the trained point."""

    objective: Objective
    trained: tuple[float, list[Tensor]]
    weight: int


def _weighted_mean(values: Sequence[float], parts: Sequence[_Part]) -> float:
    total = sum(part.weight for part in parts)
    return sum(value * part.weight for value, part in zip(values, parts, strict=True)) / total


def _add_headline(found: dict[str, Any], parts: Sequence[_Part], gradients: int) -> dict[str, Any]:
    loss = _weighted_mean([part.trained[0] for part in parts], parts)
    return {"sharpness": found["sharpness_1"], **found, "loss": loss, "gradients": gradients}


@contextlib.contextmanager
def _in_gauge(point: Point, gauge: str) -> Iterator[None]:
    with balanced(point) if gauge == "balanced" else contextlib.nullcontext():
        yield


def cut(batch: Mapping[str, Tensor], size: int) -> list[Mapping[str, Tensor]]:
    """A batch in parts of at most ``size`` examples."""
    count = rows(batch)
    return [
        {key: v[i : i + size] if v.ndim and len(v) == count else v for key, v in batch.items()}
        for i in range(0, count, size)
    ]


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
