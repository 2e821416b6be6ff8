"""Statistics of a report: intervals, sign flips, aggregates over tasks; scipy where it has them.

Every interval says how it was made and is used only at sample sizes at which it covers what it claims. A
percentile bootstrap of five seeds covers far less than its nominal level, so means over seeds get Student's
t, and intervals over clusters start at `MIN_CLUSTERS` of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from flatbench.report.numbers import rounded

Array = NDArray[np.float64]

#: of all intervals; one leaves out zero where its test's p is below one minus this
LEVEL = 0.95
#: below this many clusters (configurations) no interval is given
MIN_CLUSTERS = 20
#: exact permutation tests up to this many pairs (2^13 sign flips), drawn at random beyond
_EXACT_PAIRS = 13
_DRAWS = 9999


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes:
        low, high: NaN where no trustworthy interval exists; ``method`` then says why.
        n: values, pairs or clusters that it rests on.
        method: how the interval was made.
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int
    method: str

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))

    def excludes(self, value: float) -> bool:
        """Whether there is an interval and ``value`` lies outside."""
        return self.known and not self.low <= value <= self.high


def _unknown(estimate: float, level: float, n: int, why: str) -> Interval:
    return Interval(estimate, math.nan, math.nan, level, n, why)


def _size(*arrays: Array) -> float:
    """The largest magnitude of all values."""
    return max((float(np.abs(x).max()) for x in arrays if len(x)), default=0.0)


def _finite(values: ArrayLike) -> Array:
    array: Array = np.asarray(values, dtype=float).ravel()
    finite: Array = array[np.isfinite(array)]
    return finite


def sign_flip_p(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p of the permutation test that the differences are symmetric about zero: the share of all
    sign flips, or beyond 13 differences of so many drawn ones, whose mean is as far from zero."""
    d = _finite(differences)
    if len(d) == 0:
        return math.nan
    if len(d) == 1:
        return 1.0
    if len(d) <= _EXACT_PAIRS:
        sums = np.abs(_sign_flips(len(d)) @ d)
        return float(np.mean(sums >= abs(float(d.sum())) - 1e-12 * _size(d)))
    from scipy import stats  # a third of a second and 20 MB, which most reports do without

    found = stats.permutation_test(
        (d, np.zeros_like(d)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=_DRAWS,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


@lru_cache(maxsize=16)
def _sign_flips(n: int) -> Array:
    """Every way to give n differences a sign, up to that of all of them: ``(2^(n−1), n)``."""
    rest = np.array(list(itertools.product((1.0, -1.0), repeat=n - 1)))
    return np.column_stack([np.ones(len(rest)), rest])


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of all values (Agarwal et al. 2021, arXiv 2108.13264)."""
    from scipy import stats

    x = _finite(values)
    return rounded(float(stats.trim_mean(x, 0.25)), _size(x)) if len(x) else math.nan


def probability_of_improvement(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> float:
    """Mean over tasks of ``P(a > b) + P(a = b)/2`` for runs drawn at random (Agarwal et al. 2021, Eq. 1).

    Args:
        a, b: for every task, the scores of the runs of each method; larger is better.
    """
    from scipy import stats

    found = []
    for x, y in zip(map(_finite, a), map(_finite, b), strict=True):
        if len(x) and len(y):
            found.append(float(stats.mannwhitneyu(x, y).statistic) / (len(x) * len(y)))
    return float(np.mean(found)) if found else math.nan


def performance_profile(scores: Sequence[ArrayLike], thresholds: ArrayLike) -> Array:
    """Share of runs above each threshold, averaged over tasks (Agarwal et al. 2021: score distributions).

    Args:
        scores: for every task the scores of its runs, on a scale that tasks share.
        thresholds: ``(t,)``.

    Returns:
        ``(t,)`` values from 0 to 1, not rising where the thresholds rise.
    """
    limits = np.asarray(thresholds, dtype=float)
    tasks = [x for x in map(_finite, scores) if len(x)]
    shares: Array = np.mean([(x[:, None] > limits).mean(axis=0) for x in tasks], axis=0)
    return shares


Weighted = Callable[[Array], Array]


@runtime_checkable
class LeavesOut(Protocol):
    """A coefficient that has a faster way to leave out one cluster at a time than by weights of 0."""

    def without(self, clusters: NDArray[np.intp]) -> Array:
        """``(n,)`` labels from 0 -> its value without each cluster, ``(c,)``."""


def clustered_jackknife(
    statistic: Weighted,
    clusters: ArrayLike,
    level: float = LEVEL,
    methods: ArrayLike | None = None,
    fewest: int = MIN_CLUSTERS,
) -> Interval:
    """Interval of a correlation of values that come in clusters, by leaving out one cluster at a time.

    On Fisher's scale ``z = artanh(r)``: pseudo-values ``C·z − (C − 1)·z_(−c)``, their standard error, and
    Student's t of (C − 1), carried back. The jackknife is the bootstrap's linear approximation; for
    coefficients that are sums over pairs it covers better at a few dozen clusters, because no resample pairs
    a run with its own copy. None below ``fewest`` clusters.

    Configurations of one method are alike. With ``methods`` whole methods are left out too, and the wider of
    the two intervals is the answer: what all configurations of a method have in common is then not taken for
    so many independent observations.

    Args:
        statistic: ``(b, n)`` weights -> ``(b,)`` values in [−1, 1].
        clusters: ``(n,)`` labels.
        methods: ``(n,)`` labels of the larger clusters that hold whole clusters; not used if it is one.
    """
    estimate, count, interval = _cluster_estimate(statistic, clusters, level, 1.0, fewest)
    if interval is not None:
        return interval
    half, name = _jackknife_half(statistic, clusters, estimate, level), "configuration"
    if methods is not None and len(np.unique(np.asarray(methods))) > 1:
        by_method = _jackknife_half(statistic, methods, estimate, level)
        if not by_method <= half:  # also where it is unknown
            half, name = by_method, "method"
    if math.isnan(half):
        return _unknown(estimate, level, count, f"no interval: undefined without one {name}")
    whole = float(np.arctanh(np.clip(estimate, -1 + 1e-9, 1 - 1e-9)))
    low, high = (rounded(math.tanh(whole + sign * half), 1.0) for sign in (-1, 1))
    return Interval(estimate, low, high, level, count, f"jackknife clustered by {name}")


def _jackknife_half(statistic: Weighted, clusters: ArrayLike, estimate: float, level: float) -> float:
    """Half the width of the interval on Fisher's scale."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max()) + 1
    if isinstance(statistic, LeavesOut):
        values = statistic.without(index)
    else:
        values = statistic((1.0 - np.eye(count))[:, index])
    # a perfect correlation has no finite place on Fisher's scale
    without, whole = (np.arctanh(np.clip(v, -1 + 1e-9, 1 - 1e-9)) for v in (values, np.array([estimate])))
    pseudo = count * whole - (count - 1) * without
    return critical(count - 1, level=level) * float(pseudo.std(ddof=1)) / math.sqrt(count)


@lru_cache(maxsize=4096)
def critical(freedom: float, family: int = 1, level: float = LEVEL) -> float:
    """How many standard errors a mean must be from zero, in a family of so many: Student's t."""
    return -float(special.stdtrit(freedom, (1 - level) / (2 * family)))


def _cluster_estimate(
    statistic: Weighted, clusters: ArrayLike, level: float, scale: float, fewest: int = MIN_CLUSTERS
) -> tuple[float, int, Interval | None]:
    """The estimate, the number of clusters, and the answer if there can be no interval."""
    labels = np.asarray(clusters)
    count = len(np.unique(labels))
    estimate = math.nan
    if len(labels):
        estimate = rounded(float(statistic(np.ones((1, len(labels))))[0]), scale)
    if math.isnan(estimate):
        return estimate, count, _unknown(estimate, level, count, "no interval: undefined")
    if count < fewest:
        why = f"no interval: {count} configurations, {fewest} are needed"
        return estimate, count, _unknown(estimate, level, count, why)
    return estimate, count, None
