"""Rank correlations between flatness and generalization, over all runs or one hyper-parameter at a time.

Each coefficient takes weights, so that intervals can leave out or repeat whole configurations without pairing
a run with its own copy. Strata are never compared with each other: only runs under the same condition are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from flatbench.report.analysis.statistics import Interval, clustered_jackknife
from flatbench.report.numbers import rounded

Array = NDArray[np.float64]

#: more runs than this are averaged over seeds first: pairs grow with the square
MAX_RUNS = 600


def _signs(values: Array) -> NDArray[np.float32]:
    """``sign(v_i − v_j)``, ``(n, n)``."""
    return np.sign(values[:, None] - values[None, :]).astype(np.float32)


def _equal_labels(labels: ArrayLike) -> NDArray[np.bool_]:
    codes = pd.factorize(np.asarray(labels))[0]
    return np.asarray(codes[:, None] == codes[None, :])


def _pairs(weights: Array, matrix: NDArray[np.float32]) -> Array:
    """``Σ_ij w_i w_j m_ij`` for each row of weights."""
    w = weights.astype(np.float32)
    return np.einsum("bi,bi->b", (w @ matrix).astype(float), weights)


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


class GranulatedKendall:
    """Granulated Kendall's coefficient Ψ of Jiang et al. 2019 (arXiv 1912.02178, Eq. 5).

    For each hyper-parameter, τ over the runs that differ in it alone (τ = mean of
    ``sign(x_i − x_j)·sign(y_i − y_j)`` over pairs), averaged over the settings of all others: ψ_k; Ψ is the
    mean of the ψ_k. A hyper-parameter that never varies alone has no ψ.

    Args:
        hyper: ``(n, k)`` values of the hyper-parameters.
        fixed: labels that no compared runs may differ in (seed, condition, method).
    """

    def __init__(
        self, x: ArrayLike, y: ArrayLike, hyper: pd.DataFrame, fixed: pd.DataFrame | None = None
    ) -> None:
        columns = [pd.factorize(hyper[name].map(repr))[0] for name in hyper.columns]
        others = [] if fixed is None else [pd.factorize(fixed[name].map(repr))[0] for name in fixed.columns]
        concordance = _signs(np.asarray(x, dtype=float)) * _signs(np.asarray(y, dtype=float))
        self.names: list[str] = []
        self._axes: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]] = []
        for k, name in enumerate(hyper.columns):
            rest = [*others, *(c for j, c in enumerate(columns) if j != k)]
            setting = _joint(rest, len(hyper))
            pairs = _equal_labels(setting) & ~_equal_labels(columns[k])
            if not pairs.any():
                continue
            groups = np.eye(int(setting.max()) + 1)[setting]
            groups = groups[:, (pairs.any(axis=1) @ groups) > 0]
            self.names.append(str(name))
            self._axes.append((concordance * pairs, pairs.astype(np.float32), groups))

    def axes(self, weights: Array) -> dict[str, Array]:
        """ψ of each hyper-parameter, ``(b,)``."""
        w = weights.astype(np.float32)
        found = {}
        for name, (concordance, pairs, groups) in zip(self.names, self._axes, strict=True):
            agree = ((w @ concordance) * w).astype(float) @ groups
            total = ((w @ pairs) * w).astype(float) @ groups
            with np.errstate(invalid="ignore", divide="ignore"):
                found[name] = _nanmean(agree / total)
        return found

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
        # rank of i = Σ_j w_j·[v_j < v_i] + Σ_j w_j·[v_j = v_i]/2, over its own stratum
        self._lower_pairs = [
            (within * (1 + _signs(np.asarray(v, dtype=float))) / 2).astype(np.float32).T for v in variables
        ]

    def __call__(self, weights: Array) -> Array:
        """``(b, n)`` weights -> ``(b,)``."""
        w = weights.astype(np.float32)
        ranks = [self._centre(weights, (w @ below).astype(float)) for below in self._lower_pairs]

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
        by_name: ``kendall``, ``granulated_kendall``, ``spearman``, ``partial_spearman`` (given the training
            loss) -> interval.
        runs, configurations: what they rest on.
        unit: what was ranked: runs, or means over seeds where there are too many runs.
    """

    by_name: Mapping[str, Interval]
    runs: int
    configurations: int
    unit: str


def correlate(
    runs: pd.DataFrame, x: str, y: str, hyper: Sequence[str], given: str = "train.loss"
) -> Correlations:
    """All coefficients between two columns of final runs, conditions being strata.

    Args:
        runs: with ``condition``, ``method``, ``configuration``, ``seed``, and the columns named.
        hyper: hyper-parameters that the granulated coefficient moves one at a time.
        given: what the partial coefficient holds fixed; left out where the column is absent.
    """
    needed = [x, y] + ([given] if given in runs else [])
    known = runs.dropna(subset=[x, y])
    unit, total = "runs", len(known)
    keys = ["condition", "method", "configuration"]
    if total > MAX_RUNS:
        first = known.groupby(keys, sort=False, as_index=False)[list(hyper)].first()
        means = known.groupby(keys, sort=False, as_index=False)[list(dict.fromkeys(needed))].mean()
        means[needed] = means[needed].map(rounded)  # equal means must tie
        known, unit = means.merge(first, on=keys).assign(seed=0), "means over seeds"
    clusters = known.groupby(keys, sort=False).ngroup().to_numpy()
    if len(known) < 3:
        return Correlations({}, total, len(set(clusters)), unit)
    strata = known["condition"].to_numpy()
    a, b = (known[c].to_numpy(dtype=float) for c in (x, y))
    statistics: dict[str, Any] = {"kendall": Kendall(a, b, strata)}
    granulated = GranulatedKendall(a, b, known[list(hyper)], known[["condition", "method", "seed"]])
    if granulated.names:
        statistics["granulated_kendall"] = granulated
    statistics["spearman"] = Spearman(a, b, strata=strata)
    if given in known and known[given].notna().all():
        statistics["partial_spearman"] = Spearman(a, b, known[given].to_numpy(dtype=float), strata)
    found = {name: clustered_jackknife(statistic, clusters) for name, statistic in statistics.items()}
    return Correlations(found, total, len(set(clusters)), unit)
