"""Slices and planes of the loss through a model's trained weights: from a request to a `Landscape`."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatbench.curvature.operators.precision import Precision, check_precision, half_types
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import InputError
from flatbench.landscape import adaptive as adaptive_mode
from flatbench.landscape.axes import Axes, Axis, resolve
from flatbench.landscape.content import data_digest, function_digest
from flatbench.landscape.evaluation.collect import LogitsFunction, Values, name_of
from flatbench.landscape.evaluation.evaluate import Evaluator
from flatbench.landscape.evaluation.packing import Batch
from flatbench.landscape.evaluation.weights import Direction
from flatbench.landscape.result import Landscape
from flatbench.landscape.stream import Index, Stream
from flatbench.landscape.table import build, flat, quantities
from flatbench.models import weights
from flatbench.seeding import derive_seed
from flatbench.store import digest
from flatbench.subject.directions import Normalisation
from flatbench.subject.objective import first_examples, rows
from flatbench.subject.rounding import rounding_errors, stated
from flatbench.subject.spaces import Point, in_space, refuse_rounded_inputs
from flatbench.subject.subject import Subject

Along = str | Axes
POINTS = {1: 51, 2: 25}
#: draws at whose ends rounding errors are looked at
_ROUNDED = 3


@dataclass(frozen=True)
class Request:
    """What is asked for; see `landscape` for the meaning of each."""

    along: tuple[Axes, ...]
    dims: int
    space: NamedSpace
    distance: float | tuple[float, ...] | None
    points: int
    draws: int
    only: str | None
    adaptive: float | None
    stack: int | None
    seed: int
    precision: Precision = "float32"

    def key(self, subject: Subject, data: Mapping[str, Sequence[Batch]], functions: Sequence[Any]) -> str:
        """Digest of everything that decides the numbers: weights, data, directions, functions."""
        return digest(
            {
                "weights": weights.digest(subject.model),
                "adapted": list(subject.adapted),
                "data": {split: data_digest(batches) for split, batches in data.items()},
                # directions that follow the training loss depend on the training data and on how it is read
                "training": data_digest(subject.batches),
                "functions": [function_digest(f) for f in functions],
                **self.describe(),
                # what was found before models in half precision were measured in float32 is not this
                **({"computed_in": self.precision} if half_types(subject.model) else {}),
            }
        )

    def describe(self) -> dict[str, Any]:
        """The request, JSON-able."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "along"}
        if self.precision == "float32":  # as it was before there was a choice
            del own["precision"]
        return {**own, "along": [axes.key() for axes in self.along]}


def landscape(
    subject: Subject,
    along: Along | Sequence[Along] = "random",
    *,
    dims: int | None = None,
    space: NamedSpace = "merged",
    normalisation: Normalisation = "filter",
    distance: float | Sequence[float] | None = None,
    points: int | None = None,
    draws: int = 1,
    only: str | None = None,
    data: Mapping[str, Sequence[Batch]] | None = None,
    examples: int | None = None,
    functions: Sequence[LogitsFunction] = (),
    adaptive: bool | float = False,
    stack: int | None = None,
    seed: int | None = None,
    precision: Precision = "float32",
    stream: Path | Callable[[str], Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Landscape:
    """The loss, and functions of the logits, along lines or over a plane through the trained weights.

    ``f(t) = L(w + t·d)`` or ``f(t1, t2) = L(w + t1·d1 + t2·d2)``, by forward passes only. At the origin it is
    the checkpoint's own loss exactly. The model and the random state are left as they were found.

    Args:
        along: ``random``, ``hessian``, ``gradient``, a `Line` or a `Trajectory`; two of them for a plane over
            different kinds of directions.
        dims: 1 for lines, 2 for a plane; 2 for a trajectory or for two directions, else 1.
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        normalisation: of random directions.
        distance: the largest distance along each axis, both ways; the axes' own if None, which differ between
            models for the Hessian and for a trajectory.
        points: along an axis; odd, so that one is at the weights. 51 on a line, 25 on a plane if None.
        draws: several independent random directions (pairs of them on a plane).
        only: a regular expression; weights whose names it is not found in stay where they are.
        data: split -> batches to evaluate on; the training batches if None.
        examples: use only the first that many examples of each split.
        functions: called with all logits of a split and their labels, ``(N, classes)`` and ``(N,)``; each
            gives a number, named after the function, or several by name. Examples may come in another order
            than in the batches.
        adaptive: True (0.01) or the largest estimated error, as a share of the loss's range, at which points
            are interpolated instead of computed. Not for published figures.
        stack: points in one forward pass; chosen by the size of the forward pass if None.
        seed: of random directions; the subject's if None.
        precision: ``float32``: a model in half precision is evaluated in float32, through a copy, and the
            origin is its loss there; ``as_stored``: as it is, where small differences are lost in rounding.
        stream: a file for the points as they are computed, or a function from the request's key to one; the
            same request with the same file goes on where it was interrupted.
        progress: called with the points done and all points.

    Raises:
        InputError: what is asked for makes no sense or does not fit the model.
        NotApplicableError: the model has no such space, or no such direction.
    """
    check_precision(precision)
    data = {"train": subject.batches} if data is None else dict(data)
    data = {split: first_examples(batches, examples) for split, batches in data.items()}
    request = _validate(subject, along, dims, normalisation, distance, points, draws, adaptive, seed).request(
        space, only, stack, precision
    )
    described = {**request.describe(), "functions": [name_of(f) for f in functions]}
    key = request.key(subject, data, functions)
    with Stream(stream(key) if callable(stream) else stream, key, described) as kept:
        if kept.summary is None:
            start = time.perf_counter()
            axes = _axes(subject, request)
            summary = _compute(subject, request, data, functions, axes, kept, progress)
            kept.finish({**summary, "total_seconds": time.perf_counter() - start})
        return build(request.draws, kept)


@dataclass(frozen=True)
class _Shape:
    """The part of a request that concerns directions and grid."""

    along: tuple[Axes, ...]
    dims: int
    distance: float | tuple[float, ...] | None
    points: int
    draws: int
    adaptive: float | None
    seed: int

    def request(
        self, space: NamedSpace, only: str | None, stack: int | None, precision: Precision
    ) -> Request:
        return Request(space=space, only=only, stack=stack, precision=precision, **vars(self))


def _validate(
    subject: Subject,
    along: Along | Sequence[Along],
    dims: int | None,
    normalisation: Normalisation,
    distance: float | Sequence[float] | None,
    points: int | None,
    draws: int,
    adaptive: bool | float,
    seed: int | None,
) -> _Shape:
    listed = (along,) if isinstance(along, str | Axes) else tuple(along)
    chosen = tuple(resolve(one, normalisation) for one in listed)
    if not 1 <= len(chosen) <= 2:
        raise InputError(f"along: {len(chosen)} directions; give one or two")
    if dims is None:
        dims = 2 if len(chosen) == 2 or chosen[0].plane else 1
    if dims not in (1, 2) or (dims == 1 and len(chosen) == 2):
        raise InputError(f"dims: {dims}; give 1 for lines or 2 for a plane (two directions span a plane)")
    points = POINTS[dims] if points is None else points
    if points < 3 or points % 2 == 0:
        raise InputError(f"points: {points}; give an odd number, 3 at least, so that one is at the weights")
    if draws < 1 or (draws > 1 and not any(axes.random for axes in chosen)):
        raise InputError(f"draws: {draws}; only random directions can be drawn more than once")
    tolerance = 0.01 if adaptive is True else float(adaptive) or None
    if tolerance is not None and not 0 < tolerance < 1:
        raise InputError(f"adaptive: {adaptive}; give a share of the loss's range between 0 and 1")
    return _Shape(
        chosen,
        dims,
        _distance(distance, dims),
        points,
        draws,
        tolerance,
        subject.seed if seed is None else seed,
    )


def _distance(distance: float | Sequence[float] | None, dims: int) -> float | tuple[float, ...] | None:
    if distance is None:
        return None
    each = (float(distance),) * dims if isinstance(distance, int | float) else tuple(map(float, distance))
    if len(each) != dims or not all(0 < d < float("inf") for d in each):
        raise InputError(f"distance: {distance}; give a positive number, or one for each of {dims} axes")
    return each


def _axes(subject: Subject, request: Request) -> list[list[Axis]]:
    """Draws of as many axes as the landscape has dimensions."""
    second = any(axes.twice_differentiable for axes in request.along)
    if second:
        refuse_rounded_inputs(subject.model)
    with in_space(subject, request.space, twice_differentiable=second, precision=request.precision) as point:
        point = narrowed(point, request.only)
        each = request.dims // len(request.along)
        fixed = {
            i: axes.draw(subject, point, request.seed, each)
            for i, axes in enumerate(request.along)
            if not axes.random
        }
        draws = []
        for j in range(request.draws):
            # the stream that a study's slices use: slices of a notebook and of a study are the same
            seed = derive_seed(request.seed, "slice", j)
            drawn: list[Axis] = []
            for i, axes in enumerate(request.along):
                own = derive_seed(seed, i) if i else seed
                drawn += fixed[i] if i in fixed else axes.draw(subject, point, own, each)
            draws.append(drawn)
        return draws


def narrowed(point: Point, only: str | None) -> Point:
    """The point with those of its parameters in whose names a pattern is found.

    Raises InputError if there are none or the pattern is none.
    """
    if only is None:
        return point
    try:
        pattern = re.compile(only)
    except re.error as error:
        raise InputError(f"only: {only!r} is no regular expression ({error})") from error
    parameters = {name: p for name, p in point.parameters.items() if pattern.search(name)}
    if not parameters:
        raise InputError(
            f"only: {only!r} is found in no weight's name of this space; "
            f"one is {next(iter(point.parameters))}"
        )
    return dataclasses.replace(point, parameters=parameters, owners={n: point.owners[n] for n in parameters})


def _grid(request: Request, axes: Sequence[Axis]) -> list[list[float]]:
    """Positions along each axis; 0 is among them exactly."""
    spans: list[tuple[float, float]] = [axis.span for axis in axes]
    if isinstance(request.distance, tuple):
        spans = [(-d, d) for d in request.distance]
    return [positions(low, high, request.points) for low, high in spans]


def positions(low: float, high: float, points: int) -> list[float]:
    """``points`` even steps from about ``low`` to about ``high``, moved so that one of them is exactly 0."""
    if low == -high:
        half = points // 2
        return [high * (i - half) / half for i in range(points)]
    step = (high - low) / (points - 1)
    below = min(max(round(-low / step), 0), points - 1)
    return [step * (i - below) for i in range(points)]


def _compute(
    subject: Subject,
    request: Request,
    data: Mapping[str, Sequence[Batch]],
    functions: Sequence[LogitsFunction],
    axes: Sequence[Sequence[Axis]],
    kept: Stream,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Add every point that is wanted to ``kept``, and say what is true of all of them."""
    grid = _grid(request, axes[0])
    shape = tuple(len(axis) for axis in grid)
    total = request.draws * int(np.prod(shape))
    with in_space(subject, request.space, precision=request.precision) as point:
        point = narrowed(point, request.only)
        directions = [[axis.direction for axis in draw] for draw in axes]
        evaluator = Evaluator(point, subject.loss, data, directions, functions, stack=request.stack)
        with evaluator:
            for j in range(request.draws):
                places: list[tuple[int, ...]] = list(np.ndindex(shape))
                work = _Work(evaluator, j, grid, kept, progress, total)
                if request.adaptive is None:
                    work.compute(places)
                else:
                    _adaptive(request, shape, grid, work)
        rounding = _rounding(subject, point, next(iter(data.values())), directions, grid)
        return {
            **point.describe(),
            "axes": [[{"label": a.label, **a.facts} for a in draw] for draw in axes],
            "grid": [list(axis) for axis in grid],
            "path": next((list(p) for a in request.along if (p := a.path()) is not None), None),
            "origin": evaluator.origin,
            "rounding_error": stated(rounding + evaluator.plan.difference),
            "examples": {split: sum(map(rows, batches)) for split, batches in data.items()},
            "how": evaluator.plan.describe(),
            "stack": evaluator.plan.stack,
            "forwards": evaluator.forwards,
            "seconds": evaluator.seconds,
            "resumed_points": kept.resumed,
        }


def _rounding(
    subject: Subject,
    point: Point,
    batches: Sequence[Batch],
    directions: Sequence[Sequence[Direction]],
    grid: Sequence[Sequence[float]],
) -> float:
    """The largest rounding error of a rise of the loss at both ends of the first few draws."""
    steps = [
        functools.partial(_displacement, draw, [axis[end] for axis in grid])
        for draw in directions[:_ROUNDED]
        for end in (0, -1)
    ]
    return max(rounding_errors(subject.loss, point, batches, steps))


def _displacement(draw: Sequence[Direction], position: Sequence[float]) -> list[Tensor]:
    return [
        sum((t * part for t, part in zip(position, parts, strict=True)), torch.zeros_like(parts[0]))
        for parts in zip(*draw, strict=True)
    ]


@dataclass
class _Work:
    """Computes places of one draw that are not known yet."""

    evaluator: Evaluator
    draw: int
    grid: Sequence[Sequence[float]]
    kept: Stream
    progress: Callable[[int, int], None] | None
    total: int

    def compute(self, places: Sequence[tuple[int, ...]]) -> list[Values]:
        missing = [place for place in places if self._index(place) not in self.kept.known]
        wanted = [[axis[i] for axis, i in zip(self.grid, place, strict=True)] for place in missing]
        for place, values in zip(missing, self.evaluator.at(self.draw, wanted), strict=True):
            self.kept.add(self._index(place), values)
            if self.progress is not None:
                self.progress(len(self.kept.known), self.total)
        return [self.kept.known[self._index(place)] for place in places]

    def _index(self, place: tuple[int, ...]) -> Index:
        return (self.draw, *place)


def _adaptive(request: Request, shape: tuple[int, ...], grid: Sequence[Sequence[float]], work: _Work) -> None:
    names = quantities(work.evaluator.origin)
    drivers = [i for i, (_, name) in enumerate(names) if name == "loss"]

    def evaluate(places: Sequence[tuple[int, ...]]) -> Any:
        return np.array([flat(values) for values in work.compute(places)]).reshape(len(places), len(names))

    assert request.adaptive is not None
    origin = tuple(list(axis).index(0.0) for axis in grid)
    adaptive_mode.refine(shape, evaluate, drivers, request.adaptive, [origin])
