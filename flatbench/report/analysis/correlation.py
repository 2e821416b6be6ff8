"""Rank correlations between flatness and generalization, over all runs or one hyper-parameter at a time.

Each coefficient takes weights, so that intervals can leave out or repeat whole configurations without pairing
a run with its own copy. Strata are never compared with each other: only runs under the same condition are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from flatbench.report.analysis.statistics import MIN_CLUSTERS, Interval, clustered_jackknife
from flatbench.report.numbers import rounded

Array = NDArray[np.float64]
#: ``(n, n)`` comparisons of runs: −1, 0 and 1 take a byte, and are floats only while they are multiplied
Signs = NDArray[np.int8]
#: a frame of runs, or its columns as arrays
Columns = Any

#: more runs than this are averaged over seeds first: pairs grow with the square
MAX_RUNS = 600
KEYS = ["condition", "method", "configuration"]
LEARNING_RATE = "hyper.lr"
#: coefficients that compare runs of one method only, so that methods may differ in whatever way
WITHIN = ("granulated_kendall", "within_kendall")
#: configurations of several methods from which on such a coefficient has an interval
FEWEST_WITHIN = 9
_CHUNK = 100


def _signs(values: Array) -> Signs:
    """``sign(v_i − v_j)``, ``(n, n)``, not to be written to."""
    return _signs_of_bytes(np.ascontiguousarray(values, dtype=float).tobytes())


@lru_cache(maxsize=4)  # the coefficients of a pair of quantities are of the same values
def _signs_of_bytes(values: bytes) -> Signs:
    numbers = np.frombuffer(values)
    found = np.greater.outer(numbers, numbers).astype(np.int8)
    found -= np.less.outer(numbers, numbers)
    found.flags.writeable = False
    return found


def _codes(column: Any) -> NDArray[np.int64]:
    """A number for each distinct value."""
    values = np.asarray(column)
    if values.dtype.kind not in "iu":
        values = np.asarray([repr(v) for v in values.tolist()], dtype=object)
    return np.asarray(pd.factorize(values)[0])


def coded(runs: pd.DataFrame) -> dict[str, Any]:
    """The runs' columns as arrays, labels and hyper-parameters as numbers: `correlate` selects often, and
    frames and texts take long."""
    columns = map(str, runs.columns)
    return {
        c: _codes(runs[c]) if c in KEYS or c.startswith("hyper.") else runs[c].to_numpy() for c in columns
    }


def select(runs: Columns, chosen: Any) -> dict[str, Any]:
    """The columns at a mask."""
    return {str(name): np.asarray(runs[name])[chosen] for name in runs}


def _equal_labels(labels: ArrayLike) -> NDArray[np.bool_]:
    codes = pd.factorize(np.asarray(labels))[0]
    return np.asarray(codes[:, None] == codes[None, :])


def _times(weights: Array, matrix: Signs) -> NDArray[np.float32]:
    """``Σ_i w_i m_ij``, ``(b, n)``."""
    return np.asarray(weights.astype(np.float32) @ matrix.astype(np.float32))


def _pairs(weights: Array, matrix: Signs) -> Array:
    """``Σ_ij w_i w_j m_ij`` for each row of weights."""
    sums: Array = np.einsum("bi,bi->b", _times(weights, matrix).astype(float), weights)
    return sums


def _left_by_row(matrix: Signs, same: NDArray[np.bool_]) -> tuple[Array, Array]:
    """``Σ_j m_ij`` of a symmetric matrix, and what leaving out i's own cluster adds to the sum of all, by i.

    Exact, the sums being of −1, 0 and 1. ``same``: whether i and j are of one cluster.
    """
    rows, own = (m.sum(axis=1, dtype=np.int64).astype(float) for m in (matrix, matrix * same))
    return rows, own - 2 * rows


class Kendall:
    """Kendall's τ-b over the pairs within strata; with one stratum and equal weights it is scipy's."""

    def __init__(self, x: ArrayLike, y: ArrayLike, strata: ArrayLike | None = None) -> None:
        sx, sy = _signs(np.asarray(x, dtype=float)), _signs(np.asarray(y, dtype=float))
        if strata is not None:
            within = _equal_labels(strata)
            sx, sy = sx * within, sy * within
        self.concordance, self.x_untied, self.y_untied = sx * sy, np.abs(sx), np.abs(sy)

    def __call__(self, weights: Array) -> Array:
        """``(b, n)`` weights -> ``(b,)``."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return _pairs(weights, self.concordance) / np.sqrt(
                _pairs(weights, self.x_untied) * _pairs(weights, self.y_untied)
            )

    def without(self, clusters: NDArray[np.intp]) -> Array:
        """The coefficient without each cluster; ``(n,)`` labels from 0 -> ``(c,)``."""
        same, sums = _equal_labels(clusters), []
        for matrix in (self.concordance, self.x_untied, self.y_untied):
            rows, left = _left_by_row(matrix, same)
            sums.append(rows.sum() + np.bincount(clusters, left))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(sums[0] / np.sqrt(sums[1] * sums[2]))


class GranulatedKendall:
    """Granulated Kendall's coefficient Ψ of Jiang et al. 2019 (arXiv 1912.02178, Eq. 5).

    For each hyper-parameter, τ over the runs that differ in it alone (τ = mean of
    ``sign(x_i − x_j)·sign(y_i − y_j)`` over pairs), averaged over the settings of all others: ψ_k; Ψ is the
    mean of the ψ_k. A hyper-parameter that never varies alone has no ψ.

    Args:
        hyper: ``(n, k)`` values of the hyper-parameters.
        fixed: labels that no compared runs may differ in (seed, condition, method).
    """

    def __init__(self, x: ArrayLike, y: ArrayLike, hyper: Columns, fixed: Columns | None = None) -> None:
        names = list(hyper)
        columns = [_codes(hyper[name]) for name in names]
        others = [] if fixed is None else [_codes(fixed[name]) for name in fixed]
        concordance = _signs(np.asarray(x, dtype=float)) * _signs(np.asarray(y, dtype=float))
        self.names: list[str] = []
        self._axes: list[tuple[Signs, Signs, NDArray[np.float64]]] = []
        for k, name in enumerate(names):
            rest = [*others, *(c for j, c in enumerate(columns) if j != k)]
            setting = _joint(rest, len(concordance))
            pairs = _equal_labels(setting) & ~_equal_labels(columns[k])
            if not pairs.any():
                continue
            groups = np.eye(int(setting.max()) + 1)[setting]
            groups = groups[:, (pairs.any(axis=1) @ groups) > 0]
            self.names.append(str(name))
            self._axes.append((concordance * pairs, pairs.astype(np.int8), groups))

    def axes(self, weights: Array) -> dict[str, Array]:
        """ψ of each hyper-parameter, ``(b,)``."""
        w = weights.astype(np.float32)
        found = {}
        for name, (concordance, pairs, groups) in zip(self.names, self._axes, strict=True):
            agree = (_times(weights, concordance) * w).astype(float) @ groups
            total = (_times(weights, pairs) * w).astype(float) @ groups
            with np.errstate(invalid="ignore", divide="ignore"):
                found[name] = _nanmean(agree / total)
        return found

    def without(self, clusters: NDArray[np.intp]) -> Array:
        """Ψ without each cluster; ``(n,)`` labels from 0 -> ``(c,)``."""
        same, count, found = _equal_labels(clusters), int(clusters.max()) + 1, []
        for concordance, pairs, groups in self._axes:
            width, sums = groups.shape[1], []
            # a row of no group has no pairs, and adds nothing to the first
            places = clusters * width + groups.argmax(axis=1)
            for matrix in (concordance, pairs):
                rows, left = _left_by_row(matrix, same)
                changes = np.bincount(places, left, count * width).reshape(count, width)
                sums.append(rows @ groups + changes)
            with np.errstate(invalid="ignore", divide="ignore"):
                found.append(_nanmean(sums[0] / sums[1]))
        return _nanmean(np.stack(found, axis=1))

    def __call__(self, weights: Array) -> Array:
        """``(b, n)`` weights -> ``(b,)``; NaN where no hyper-parameter varies alone."""
        found = list(self.axes(weights).values())
        return _nanmean(np.stack(found, axis=1)) if found else np.full(len(weights), math.nan)


def _joint(codes: Sequence[Any], length: int) -> NDArray[np.int64]:
    """One label for each distinct combination of labels."""
    if not codes:
        return np.zeros(length, dtype=np.int64)
    return np.asarray(np.unique(np.stack(codes, axis=1), axis=0, return_inverse=True)[1]).ravel()


def _nanmean(values: Array) -> Array:
    """Mean over the last axis of what is defined."""
    known = np.isfinite(values)
    counts = known.sum(axis=-1)
    totals = np.where(known, values, 0.0).sum(axis=-1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), math.nan)


class Spearman:
    """Spearman's ρ, or with ``given`` the partial one: ranks within strata, centred there, then Pearson's.

    ``ρ_xy·z = (ρ_xy − ρ_xz ρ_yz) / sqrt((1 − ρ_xz²)(1 − ρ_yz²))`` for one given variable z.
    """

    def __init__(
        self, x: ArrayLike, y: ArrayLike, given: ArrayLike | None = None, strata: ArrayLike | None = None
    ) -> None:
        variables = [x, y] if given is None else [x, y, given]
        codes = (
            np.zeros(len(np.asarray(x)), dtype=int) if strata is None else pd.factorize(np.asarray(strata))[0]
        )
        self._strata = np.eye(int(codes.max()) + 1)[codes] if len(codes) else np.zeros((0, 0))
        within = _equal_labels(codes)
        # rank of i = Σ_j w_j·[v_j < v_i] + Σ_j w_j·[v_j = v_i]/2, over its own stratum: twice its terms
        self._lower_pairs = [within * (1 + _signs(np.asarray(v, dtype=float))).T for v in variables]

    def __call__(self, weights: Array) -> Array:
        """``(b, n)`` weights -> ``(b,)``."""
        ranks = [
            self._centre(weights, _times(weights, below).astype(float) / 2) for below in self._lower_pairs
        ]

        def pearson(a: Array, b: Array) -> Array:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(
                    (weights * a * b).sum(axis=1)
                    / np.sqrt((weights * a * a).sum(axis=1) * (weights * b * b).sum(axis=1))
                )

        xy = pearson(ranks[0], ranks[1])
        if len(ranks) == 2:
            return xy
        xz, yz = pearson(ranks[0], ranks[2]), pearson(ranks[1], ranks[2])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2)))

    def _centre(self, weights: Array, ranks: Array) -> Array:
        totals = np.maximum(weights @ self._strata, 1e-300)
        means = ((weights * ranks) @ self._strata) / totals
        return ranks - means @ self._strata.T


@dataclass(frozen=True)
class Correlations:
    """The coefficients of one pair of quantities.

    Attributes:
        by_name: coefficient -> interval. The levels first, each a Kendall's τ: ``granulated_kendall`` (runs
            that differ in one hyper-parameter alone), ``within_kendall`` (runs of one method), ``equal_lr``
            (runs at one learning rate), ``kendall`` (all runs); then ``spearman`` and ``partial_spearman``
            (given the training loss).
        runs, configurations: what they rest on. A configuration under several conditions is one.
        unit: what was ranked: runs, or means over seeds where there are too many runs.
    """

    by_name: Mapping[str, Interval]
    runs: int
    configurations: int
    unit: str


def comparable(
    runs: Columns, x: str, y: str, hyper: Sequence[str], more: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """The runs that have both numbers, or their means over seeds where they are more than `MAX_RUNS`; and
    which of the two."""
    wanted = list(dict.fromkeys([*KEYS, "seed", x, y, *hyper, *more]))
    given = {name: np.asarray(runs[name]) for name in wanted}
    known = select(given, np.isfinite(given[x].astype(float)) & np.isfinite(given[y].astype(float)))
    if len(known[x]) <= MAX_RUNS:
        return known, "runs"
    frame, needed = pd.DataFrame(known), list(dict.fromkeys([x, y, *more]))
    grouped = frame.groupby(KEYS, sort=False)
    means = grouped[needed].mean().map(rounded)  # equal means must tie
    averaged = means.join(grouped[list(hyper)].first()).reset_index().assign(seed=0)
    return {str(c): averaged[c].to_numpy() for c in averaged.columns}, "means over seeds"


def correlate(
    runs: Columns, x: str, y: str, hyper: Sequence[str], given: str = "train.loss", only: Sequence[str] = ()
) -> Correlations:
    """All coefficients between two columns of final runs, conditions being strata.

    Args:
        runs: with ``condition``, ``method``, ``configuration``, ``seed``, and the columns named.
        hyper: hyper-parameters that the granulated coefficient moves one at a time.
        given: what the partial coefficient holds fixed; left out where the column is absent.
        only: names of coefficients, if not all are wanted.
    """
    known, unit = comparable(runs, x, y, hyper, [given] if given in runs else [])
    total = int((np.isfinite(np.asarray(runs[x], float)) & np.isfinite(np.asarray(runs[y], float))).sum())
    count = len(known[x])
    condition, methods, configuration = (_codes(known[name]) for name in KEYS)
    clusters = _joint([methods, configuration], count)
    several = len(np.unique(methods)) > 1
    if count < 3:
        return Correlations({}, total, len(np.unique(clusters)), unit)
    a, b = (known[c].astype(float) for c in (x, y))
    made: dict[str, Any] = {
        "granulated_kendall": lambda: GranulatedKendall(
            a,
            b,
            {h: known[h] for h in hyper},
            {"condition": condition, "method": methods, "seed": known["seed"]},
        ),
        "within_kendall": lambda: Kendall(a, b, _joint([condition, methods], count)) if several else None,
        "equal_lr": lambda: _at_equal_rate(a, b, condition, known, hyper),
        "kendall": lambda: Kendall(a, b, condition),
        "spearman": lambda: Spearman(a, b, strata=condition),
        "partial_spearman": lambda: _partial(a, b, known, given, condition),
    }
    found = {}
    for name in only or made:
        statistic = made[name]()
        if statistic is None or (isinstance(statistic, GranulatedKendall) and not statistic.names):
            continue
        fewest = FEWEST_WITHIN if several and name in WITHIN else MIN_CLUSTERS
        found[name] = clustered_jackknife(statistic, clusters, methods=methods, fewest=fewest)
    return Correlations(found, total, len(np.unique(clusters)), unit)


def _at_equal_rate(a: Array, b: Array, condition: Any, known: Columns, hyper: Sequence[str]) -> Any:
    if LEARNING_RATE not in hyper:
        return None
    rates = _codes(known[LEARNING_RATE])
    return Kendall(a, b, _joint([condition, rates], len(a))) if len(np.unique(rates)) > 1 else None


def _partial(a: Array, b: Array, known: Columns, given: str, condition: Any) -> Any:
    if given not in known or not np.isfinite(known[given].astype(float)).all():
        return None
    return Spearman(a, b, known[given].astype(float), condition)


def within_p_value(runs: Columns, x: str, y: str, hyper: Sequence[str], draws: int = 999) -> float:
    """Permutation p of the absence of any relation within methods, two-sided; NaN where nothing can move.

    A method's configurations exchange their values of y, whole blocks of conditions and seeds at once, so
    that configurations keep what their runs have in common. The statistic is the number of concordant minus
    that of discordant pairs within method and condition. Drawn with a fixed seed; at least 1/(draws + 1).
    Configurations that lack a run which others of their method have are left out.
    """
    known, _ = comparable(runs, x, y, hyper)
    rng = np.random.default_rng(0)
    observed, drawn, moved = 0.0, np.zeros(draws), False
    condition, methods, configuration = (_codes(known[name]) for name in KEYS)
    cell = _joint([condition, _codes(known["seed"])], len(methods))
    for method in np.unique(methods):
        own = methods == method
        rows, places = (np.unique(v[own], return_inverse=True) for v in (configuration, cell))
        first, second = (np.full((len(rows[0]), len(places[0])), math.nan) for _ in range(2))
        first[rows[1], places[1]], second[rows[1], places[1]] = known[x][own], known[y][own]
        whole = np.isfinite(first).all(axis=1)
        if whole.sum() < 3:
            continue
        moved, count = True, int(whole.sum())
        orders = np.argsort(rng.random((draws, count)), axis=1)
        held = np.array([condition[own][places[1] == k][0] for k in range(len(places[0]))])
        for one in np.unique(held):
            u, v = (_signs(values[whole][:, held == one].ravel()) for values in (first, second))
            observed += float((u * v).sum())
            seeds = len(u) // count
            for start in range(0, draws, _CHUNK):
                some = orders[start : start + _CHUNK]
                at = (some[:, :, None] * seeds + np.arange(seeds)).reshape(len(some), -1)
                pairs = v[at[:, :, None], at[:, None, :]].reshape(len(some), -1)
                drawn[start : start + len(some)] += pairs.astype(np.float32) @ u.ravel().astype(np.float32)
    if not moved:
        return math.nan
    return float((1 + (np.abs(drawn) >= abs(observed) - 1e-6).sum()) / (draws + 1))
