"""Statistics of a report: intervals, paired comparisons, aggregates over tasks; scipy where it has them.

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
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from flatbench.report.numbers import rounded

Array = NDArray[np.float64]

#: below this many clusters (configurations) no interval is given
MIN_CLUSTERS = 20
#: below this many values a bootstrap interval is not given
MIN_VALUES = 20
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


def _symmetric(estimate: float, half: float, level: float, n: int, method: str, scale: float) -> Interval:
    """``estimate ± half``, without the digits that rounding made of terms of size ``scale``."""
    low, high = (rounded(float(estimate + sign * half), scale) for sign in (-1, 1))
    return Interval(rounded(float(estimate), scale), low, high, level, n, method)


def _size(*arrays: Array) -> float:
    """The largest magnitude of all values."""
    return max((float(np.abs(x).max()) for x in arrays if len(x)), default=0.0)


def _finite(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=float).ravel()
    return array[np.isfinite(array)]


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student's t interval of a mean: exact for normal values at any n ≥ 2. NaNs are left out."""
    x = _finite(values)
    if len(x) == 0:
        return _unknown(math.nan, level, 0, "no interval: no values")
    if len(x) == 1:
        return _unknown(float(x[0]), level, 1, "no interval: one value")
    half = float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * x.std(ddof=1) / math.sqrt(len(x))
    return _symmetric(x.mean(), half, level, len(x), "Student's t", _size(x))


def stratified_mean_interval(groups: Sequence[ArrayLike], level: float = 0.95) -> Interval:
    """Mean of the groups' means with Satterthwaite's degrees of freedom: groups may differ in variance.

    ``SE² = Σ_c v_c / C²`` with ``v_c = s_c²/n_c``, ``df = (Σ v_c)² / Σ v_c²/(n_c − 1)`` for C groups.
    """
    arrays = [x for x in map(_finite, groups) if len(x)]
    n = sum(map(len, arrays))
    if not arrays:
        return _unknown(math.nan, level, 0, "no interval: no values")
    estimate = float(np.mean([x.mean() for x in arrays]))
    if any(len(x) < 2 for x in arrays):
        return _unknown(estimate, level, n, "no interval: a group with one value")
    variances = np.array([x.var(ddof=1) / len(x) for x in arrays])
    if variances.sum() == 0:
        return _symmetric(estimate, 0.0, level, n, "Welch-Satterthwaite t", _size(*arrays))
    freedom = variances.sum() ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(variances, arrays, strict=True))
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(variances.sum()) / len(arrays)
    return _symmetric(estimate, half, level, n, "Welch-Satterthwaite t", _size(*arrays))


@dataclass(frozen=True)
class Paired:
    """A paired comparison.

    Attributes:
        difference: mean of a − b with its t interval.
        p_value: two-sided, of the sign-flip permutation test of the mean difference; NaN without pairs.
        exact: whether all sign flips were counted.
    """

    difference: Interval
    p_value: float
    exact: bool


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95, seed: int = 0) -> Paired:
    """Differences of values that share what is random (seed, data order, label noise).

    With n pairs the smallest p that the test can give is 2/2ⁿ: three seeds cannot reach 0.05.

    Args:
        a, b: (n,) values in the same order; pairs with a NaN are left out.

    Raises ValueError if the lengths differ.
    """
    first, second = np.asarray(a, dtype=float).ravel(), np.asarray(b, dtype=float).ravel()
    if len(first) != len(second):
        raise ValueError(f"paired values must be equally many, not {len(first)} and {len(second)}")
    both = np.isfinite(first) & np.isfinite(second)
    differences = first[both] - second[both]
    return Paired(
        mean_interval(differences, level), sign_flip_p(differences, seed), len(differences) <= _EXACT_PAIRS
    )


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


def holm(p_values: ArrayLike) -> Array:
    """P values adjusted for their number (Holm 1979): reject where the adjusted one is below the level.

    NaNs stay and do not count.
    """
    p = np.asarray(p_values, dtype=float)
    adjusted = np.full(p.shape, math.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = np.arange(len(order), 0, -1) * p[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of all values (Agarwal et al. 2021, arXiv 2108.13264)."""
    x = _finite(values)
    return rounded(float(stats.trim_mean(x, 0.25)), _size(x)) if len(x) else math.nan


def probability_of_improvement(a: Sequence[ArrayLike], b: Sequence[ArrayLike]) -> float:
    """Mean over tasks of ``P(a > b) + P(a = b)/2`` for runs drawn at random (Agarwal et al. 2021, Eq. 1).

    Args:
        a, b: for every task, the scores of the runs of each method; larger is better.
    """
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
    return np.mean([(x[:, None] > limits).mean(axis=0) for x in tasks], axis=0)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    method: Literal["BCa", "percentile"] = "BCa",
    resamples: int = _DRAWS,
    seed: int = 0,
) -> Interval:
    """scipy's bootstrap interval of a statistic of independent values; none below `MIN_VALUES` of them.

    Args:
        statistic: takes an array and ``axis``.
    """
    x = _finite(values)
    estimate = float(statistic(x, axis=0)) if len(x) else math.nan
    if len(x) < MIN_VALUES:
        return _unknown(estimate, level, len(x), f"no interval: {len(x)} values, {MIN_VALUES} are needed")
    found = stats.bootstrap(
        (x,),
        statistic,
        confidence_level=level,
        method=method,
        n_resamples=resamples,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    low, high = (rounded(float(limit), _size(x)) for limit in (found.low, found.high))
    return Interval(rounded(estimate, _size(x)), low, high, level, len(x), f"{method} bootstrap")


Weighted = Callable[[Array], Array]


def cluster_weights(clusters: ArrayLike, resamples: int, seed: int) -> Array:
    """How often each value is drawn when whole clusters are drawn with replacement: ``(resamples, n)``."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return draws[:, index].astype(float)


def clustered_bootstrap(
    statistic: Weighted, clusters: ArrayLike, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Interval of a statistic of values that come in clusters: the runs of one configuration belong together.

    ``estimate ± t·SE`` with the bootstrap's standard error and Student's t of (clusters − 1), which covers
    better than percentiles at a few dozen clusters. None below `MIN_CLUSTERS`.

    Args:
        statistic: ``(b, n)`` weights -> ``(b,)`` values; a weight says how often a value counts.
        clusters: ``(n,)`` labels.
    """
    estimate, count, interval = _cluster_estimate(statistic, clusters, level, 0.0)
    if interval is not None:
        return interval
    error = float(np.nanstd(statistic(cluster_weights(clusters, resamples, seed)), ddof=1))
    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    method = "bootstrap clustered by configuration"
    return _symmetric(estimate, half, level, count, method, abs(estimate))


def clustered_jackknife(
    statistic: Weighted,
    clusters: ArrayLike,
    level: float = 0.95,
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
    values = statistic((1.0 - np.eye(count))[:, index])
    # a perfect correlation has no finite place on Fisher's scale
    without, whole = (np.arctanh(np.clip(v, -1 + 1e-9, 1 - 1e-9)) for v in (values, np.array([estimate])))
    pseudo = count * whole - (count - 1) * without
    return float(stats.t.ppf((1 + level) / 2, count - 1)) * float(pseudo.std(ddof=1)) / math.sqrt(count)


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
