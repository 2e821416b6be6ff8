"""Rounding error of a rise of the loss, which is compared with the same rise in float64, on a few rows."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from flatbench.curvature.estimates.probes import student
from flatbench.curvature.operators.batches import chosen
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.precision import Exactly, widened, without_autocast
from flatbench.subject.objective import rows
from flatbench.subject.spaces import Point
from flatbench.subject.subject import LossFunction

log = logging.getLogger(__name__)

#: rows that are looked at, and at most how many of them at once
ROWS, TOGETHER = 16, 4
#: units in the last place by which a loss in float64 may be off, for which there is no finer truth
OF_DOUBLE = 32.0

Step = Callable[[], Sequence[Tensor]]


def rounding_errors(
    loss: LossFunction, point: Point, batches: Sequence[Mapping[str, Tensor]], steps: Sequence[Step]
) -> list[float]:
    """How far rounding may take the rise ``L(w + ε) − L(w)`` of the mean loss from the exact one, for each ε.

    Up to `ROWS` rows, evenly spaced, are evaluated at both points as the measure does, and in float64 with
    the same weights and the same ε, which is rounded only here. With e_g the difference of the two rises
    over the g-th few rows: ``|mean e| + t·s(e)/√G``, the far end of a 95 % interval for the mean over all
    rows, and beside it the last place of the two losses. What the weights lose of a small step, TF32,
    autocast and the order of sums are all in it. In float64 itself, 32 times the last place.

    Args:
        loss: (model, batch) -> (mean loss, number of terms).
        point: at the trained point.
        steps: give ε, a tensor for each parameter of the point.

    Returns:
        An error for each step; infinite where it cannot be told: quantised weights, or a model that cannot be
        computed in float64, for whatever reason.
    """
    few = _few(batches)
    if not steps or not few:
        return [math.inf] * len(steps)
    packed = [n for n, p in point.model.named_parameters() if _is_packed(p)]
    if packed:
        log.info("rounding errors are not known: %s is quantised", packed[0])
        return [math.inf] * len(steps)
    for part in (few, list(batches[:1])):  # some losses cannot be taken of a part of a batch
        try:
            with torch.no_grad():
                own = [_losses(loss, point, part, step) for step in (None, *steps)]
                with _in_float64(point):
                    exact = [_losses(loss, point, part, step) for step in (None, *steps)]
        except Exception as error:  # kernels, compilers, memory: what was measured holds all the same
            log.info("no rounding errors from %d batches in float64: %s", len(part), error)
            continue
        pairs = zip(own[1:], exact[1:], strict=True)
        return [_error(own[0], away, exact[0], there) for away, there in pairs]
    log.warning("rounding errors are not known: the model does not run in float64")
    return [math.inf] * len(steps)


def stated(error: float) -> float | None:
    """An error as a result says it: None where it is unknown."""
    return error if math.isfinite(error) else None


def told(rises: Sequence[float], errors: Sequence[float], numbered: bool = True) -> dict[str, Any]:
    """The entries of a result that say of each rise what rounding does to it.

    ``rounding_error_i`` (None where it is not known) and ``below_resolution_i``: whether the i-th rise is no
    larger than its error, so that it cannot be told from 0; without ``numbered`` those of the first alone.
    """
    found: dict[str, Any] = {}
    for i, (rise, error) in enumerate(zip(rises, errors, strict=True), start=1):
        place = f"_{i}" if numbered else ""
        found[f"rounding_error{place}"] = stated(error)
        found[f"below_resolution{place}"] = abs(rise) <= error if math.isfinite(error) else None
    return found


def _is_packed(parameter: Tensor) -> bool:
    return not parameter.is_floating_point() or parameter.dtype.itemsize == 1


@contextlib.contextmanager
def _in_float64(point: Point) -> Iterator[None]:
    with (
        widened(point.model, torch.float64, point.parameters.values()),
        without_autocast(point.model),
        Exactly(torch.float64),
    ):
        yield


def _few(batches: Sequence[Mapping[str, Tensor]]) -> list[Mapping[str, Tensor]]:
    """A few rows in still smaller batches, each cut out of one of the batches."""
    total = sum(map(rows, batches))
    wanted = torch.linspace(0, max(total - 1, 0), min(ROWS, total)).round().long().unique()
    found, offset = [], 0
    for batch in batches:
        size = rows(batch)
        here = wanted[(wanted >= offset) & (wanted < offset + size)] - offset
        offset += size
        found += [chosen(batch, part) for part in here.split(TOGETHER) if len(part)]
    return found


_Losses = list[tuple[float, int, float]]


def _losses(loss: LossFunction, point: Point, few: Sequence[Any], step: Step | None) -> _Losses:
    """Loss, terms, and the loss's last place, of each few rows."""
    with contextlib.nullcontext() if step is None else point.moved(step()), losses_in_float32(point.model):
        found = [loss(point.model, batch) for batch in few]
    return [(float(v), n, _place(v.dtype) * abs(float(v))) for v, n in found if n]


def _place(kind: torch.dtype) -> float:
    return float(torch.finfo(kind).eps) * (OF_DOUBLE if kind == torch.float64 else 1.0)


def _error(rest: _Losses, away: _Losses, exact_rest: _Losses, exact_away: _Losses) -> float:
    if not rest:
        return math.inf
    mean = sum(terms for _, terms, _ in rest) / len(rest)
    errors = [
        ((b - a) - (d - c)) * terms / mean
        for (a, terms, _), (b, *_), (c, *_), (d, *_) in zip(rest, away, exact_rest, exact_away, strict=True)
    ]
    if not all(map(math.isfinite, errors)):
        return math.inf
    count = len(errors)
    spread = student(count) * stdev(errors) / math.sqrt(count) if count > 1 else 10 * abs(errors[0])
    place = sum((u + v) * n / mean for (_, n, u), (_, _, v) in zip(rest, away, strict=True)) / count
    return abs(sum(errors)) / count + spread + place
