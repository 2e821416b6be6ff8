"""Exact points where a surface bends, interpolated ones elsewhere, each with an estimate of its error.

The interpolant is the cubic radial basis function with a linear trend. Its leave-one-out errors come from one
factorisation (Rippa 1999, Adv. Comput. Math. 11): with A the interpolation matrix and c its solution, leaving
point i out changes the prediction there by ``c_i / (A⁻¹)_ii``. They set the local scale of the interpolant's
power function, which tells how far each place is from what is known; the product estimates the error there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Array = NDArray[np.float64]
Place = tuple[int, ...]
#: computed neighbours whose leave-one-out errors say how rough the surface is at a place
NEIGHBOURS = 6
#: nodes along an axis to begin with, and exact points added between two fits
COARSE, ROUND = 7, 12


@dataclass(frozen=True)
class Refined:
    """A grid of which some places are computed.

    Attributes:
        computed: ``grid``, whether the value is exact.
        values: ``(*grid, quantities)``.
        errors: ``(*grid, quantities)``, estimated absolute errors; 0 where computed.
    """

    computed: NDArray[np.bool_]
    values: Array
    errors: Array


def refine(
    shape: tuple[int, ...],
    evaluate: Callable[[Sequence[Place]], Array],
    drivers: Sequence[int],
    tolerance: float,
    start: Sequence[Place] = (),
) -> Refined:
    """Compute places of a grid until the estimated error of all others is small.

    Args:
        shape: of the grid, one or two axes.
        evaluate: exact values ``(places, quantities)``.
        drivers: the quantities that are to be known that well; the others come along.
        tolerance: of the error, relative to the range of the quantity over the computed places.
        start: places to compute beside the coarse grid.

    Returns:
        Everything computed where a value is not finite, for nothing can be interpolated there.
    """
    places = list(dict.fromkeys([*coarse(shape), *start]))
    values = evaluate(places)
    while len(places) < int(np.prod(shape)):
        if not np.isfinite(values).all():
            rest = [p for p in np.ndindex(shape) if p not in set(places)]
            return _exact(shape, [*places, *rest], np.concatenate([values, evaluate(rest)]))
        predicted, errors = interpolate(shape, places, values)
        span = np.ptp(values, axis=0)
        excess = (errors / np.where(span > 0, span, 1.0))[..., list(drivers)].max(axis=-1)
        chosen = _worst(excess, tolerance)
        if not chosen:
            computed = np.zeros(shape, bool)
            computed[tuple(np.transpose(places))] = True
            return Refined(computed, predicted, errors)
        places += chosen
        values = np.concatenate([values, evaluate(chosen)])
    return _exact(shape, places, values)


def coarse(shape: tuple[int, ...]) -> list[Place]:
    """Evenly spread nodes, the ends of each axis among them."""
    axes = [np.unique(np.linspace(0, n - 1, min(n, COARSE)).round().astype(int)) for n in shape]
    return [tuple(int(i) for i in place) for place in itertools.product(*axes)]


def interpolate(shape: tuple[int, ...], places: Sequence[Place], values: Array) -> tuple[Array, Array]:
    """Values ``(*shape, quantities)`` from those at some places, and estimated absolute errors."""
    scale = np.maximum(np.array(shape) - 1, 1)
    known = np.array(places) / scale
    every = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, len(shape)) / scale
    inverse = np.linalg.inv(_matrix(known))
    solution = inverse @ np.concatenate([values, np.zeros((len(shape) + 1, values.shape[1]))])
    features = np.concatenate([_kernel(every, known), _trend(every)], axis=1)
    predicted = features @ solution
    diagonal = np.abs(np.diag(inverse)[: len(known)])
    # leave-one-out error over the power function of the place left out, which is diagonal^(-1/2)
    roughness = np.abs(solution[: len(known)]) / np.sqrt(np.maximum(diagonal, 1e-300))[:, None]
    power = np.sqrt(np.abs(((features @ inverse) * features).sum(axis=1)))
    tree = cKDTree(known)
    reach = tree.query(every, k=[min(NEIGHBOURS, len(known))])[0][:, 0]
    # all that are as near as the last of them: which of those a search finds first is chance
    near = tree.query_ball_point(every, reach * (1 + 1e-9))
    errors = power[:, None] * np.array([roughness[own].max(axis=0) for own in near])
    index = np.ravel_multi_index(np.transpose(places), shape)
    predicted[index], errors[index] = values, 0.0
    return predicted.reshape(*shape, -1), errors.reshape(*shape, -1)


def _matrix(known: Array) -> Array:
    trend = _trend(known)
    zeros = np.zeros((trend.shape[1], trend.shape[1]))
    return np.block([[_kernel(known, known), trend], [trend.T, zeros]])


def _kernel(a: Array, b: Array) -> Array:
    distance: Array = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return distance**3


def _trend(a: Array) -> Array:
    return np.concatenate([np.ones((len(a), 1)), a], axis=1)


def _worst(excess: Array, tolerance: float) -> list[Place]:
    """The places furthest above the tolerance, no two of them neighbours."""
    chosen: list[Place] = []
    # what differs by rounding alone is taken in the grid's order, so that every machine goes the same way
    whole = np.round(excess / max(float(np.abs(excess).max()), 1e-300), 6)
    for flat in np.argsort(-whole, axis=None, kind="stable"):
        place = tuple(int(i) for i in np.unravel_index(flat, excess.shape))
        if excess[place] <= tolerance or len(chosen) == ROUND:
            break
        if all(max(abs(a - b) for a, b in zip(place, other, strict=True)) > 1 for other in chosen):
            chosen.append(place)
    return chosen


def _exact(shape: tuple[int, ...], places: Sequence[Place], values: Array) -> Refined:
    full = np.empty((*shape, values.shape[1]))
    full[tuple(np.transpose(places))] = values
    return Refined(np.ones(shape, bool), full, np.zeros_like(full))
