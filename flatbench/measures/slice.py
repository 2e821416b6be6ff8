"""The loss along straight lines through the trained weights: the width of the valley, for figures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from flatbench.config.registry import LATER
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import FlatbenchError, InputError
from flatbench.landscape.explore import landscape
from flatbench.measures.base import Measure
from flatbench.measures.options import checked
from flatbench.subject.directions import Normalisation
from flatbench.subject.subject import Subject

#: what a landscape says of where it was taken
_PLACE = ("space", "dimension", "precision", "stored_precision", "copy_bytes")


class Slice(Measure):
    """Training loss along random, filter-normalised lines through the weights (Li et al. 2018).

    ``f_j(t) = L(w + t·d_j)`` for evenly spaced t in [−distance, distance]. Methods with one seed are cut
    along the same random directions, each scaled to its own weights.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        normalisation: ``filter`` (a step of 1 is as long as the weights, filter by filter), ``layer``
            (tensor by tensor) or ``none`` (unit directions: t is an l2 distance).
        distance: the largest t.
        points: losses per direction, that at 0 included; odd. With 4n + 1 the half distance is among them.
        directions: how many lines.
        examples: use only the first that many training examples; None for all.
        precision: ``float32``: a model in half precision is measured in float32, through a copy;
            ``as_stored``: as it is, where small differences are lost in rounding.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        normalisation: Normalisation = "filter",
        distance: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0,
        points: Annotated[int, Field(ge=3)] = 21,
        directions: Annotated[int, Field(ge=1)] = 3,
        examples: Annotated[int, Field(ge=1)] | None = None,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        checked(
            Slice,
            space=space,
            normalisation=normalisation,
            distance=distance,
            points=points,
            directions=directions,
            examples=examples,
            precision=precision,
        )
        if points % 2 == 0:
            raise InputError(f"Slice: points: {points} is even; an odd number has a point at the weights")
        self.space, self.normalisation, self.distance = space, normalisation, distance
        self.points, self.directions, self.examples = points, directions, examples
        self.precision: Precision = precision

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure, by forward passes only.

        Returns:
            ``positions`` (``points`` values of t), ``losses`` (``directions`` lists of ``points`` losses);
            ``loss`` (at t = 0); ``mean_rise`` and ``mean_rise_half`` (``(f(t) + f(−t))/2 − f(0)``, averaged
            over directions, at t = distance and at half of it; the latter None where the half is not among
            the positions); ``curvature`` (``(f(h) + f(−h) − 2f(0))/h²`` for the smallest step h, averaged:
            along these lines, not the worst one); ``rounding_error`` (of a rise, see
            `flatbench.subject.rounding`, at the ends of the lines), ``below_resolution`` (``mean_rise``
            cannot be told from 0) and ``curvature_rounding_error``; ``direction_norm`` (mean l2 length of
            the directions);
            ``seconds``, ``examples``, ``space``, ``dimension``, ``precision``.

        Raises:
            NotApplicableError: the model has no such space.
            FlatbenchError: a loss is not finite.
        """
        start = time.perf_counter()
        found = landscape(
            subject,
            "random",
            dims=1,
            space=self.space,
            normalisation=self.normalisation,
            distance=self.distance,
            points=self.points,
            draws=self.directions,
            examples=self.examples,
            precision=self.precision,
        )
        meta, half = found.meta, self.points // 2
        positions = meta["grid"][0]
        losses = [found.values(draw=j)["value"].tolist() for j in range(self.directions)]
        _check_finite(losses, positions)
        rise, error, step = _mean_rise(losses, half), found.rounding_error, positions[half + 1]
        return {
            "mean_rise": rise,
            "rounding_error": error,
            "below_resolution": None if error is None else abs(rise) <= error,
            "mean_rise_half": _mean_rise(losses, half // 2) if half % 2 == 0 else None,
            "curvature": 2 * _mean_rise(losses, 1) / step**2,
            "curvature_rounding_error": None if error is None else 2 * error / step**2,
            "loss": found.loss,
            "direction_norm": fmean(draw[0]["norm"] for draw in meta["axes"]),
            "seconds": time.perf_counter() - start,
            "examples": meta["examples"]["train"],
            **{name: meta[name] for name in _PLACE if name in meta},
            "positions": positions,
            "losses": losses,
        }


def _check_finite(losses: Sequence[Sequence[float]], positions: Sequence[float]) -> None:
    for line in losses:
        for position, loss in zip(positions, line, strict=True):
            if not math.isfinite(loss):
                raise FlatbenchError(f"the loss is {loss} at position {position:g} of a slice")


def _mean_rise(losses: Sequence[Sequence[float]], offset: int) -> float:
    """``(f(t) + f(−t))/2 − f(0)`` at ``offset`` positions from the middle, averaged over directions."""
    middle = len(losses[0]) // 2
    return fmean((f[middle + offset] + f[middle - offset]) / 2 - f[middle] for f in losses)
