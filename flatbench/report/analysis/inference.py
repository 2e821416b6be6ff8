"""Differences of several methods to one other, judged together: intervals, p values and power that agree.

Values of one seed are paired. The unit is the seed, whatever number of conditions it was run under, because
data order, start and wrong labels of one seed come back under every condition.

With three seeds a comparison's own spread has two degrees of freedom and is mostly luck; the spread of all
comparisons together is known better, but wrong for a method that is less stable than the others. So each is
judged with the larger of the two. Intervals and p values are simultaneous over a family (Bonferroni's
inequality), and are two readings of one test: an interval leaves out zero if and only if p is below 0.05.
How often they mislead, also where methods differ tenfold in spread: ``benchmarks/results/inference.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from flatbench.report.analysis.statistics import LEVEL, Interval, critical, sign_flip_p
from flatbench.report.numbers import rounded

Array = NDArray[np.float64]

#: chance to see a difference that is as large as `Judgement.smallest` says
POWER = 0.8
#: no answer to "how many seeds" above this
MOST_SEEDS = 1000
#: outcomes of the exact test that must lie below 0.05: with one alone it would miss most differences
_ARRANGEMENTS = 8
#: correlation of two comparisons' estimated variances that share a reference: 0.25 if all methods are alike,
#: more if the reference is the less stable one. With 0.35 the simulated error rates hold up to five times
_SHARED = 0.35


@dataclass(frozen=True)
class Judgement:
    """One mean difference among the ``family`` that is judged together.

    Attributes:
        interval: simultaneous over the family; unknown (with why) below two seeds or without spread.
        p: of the same test, times the size of the family, at most 1.
        p_exact: of all sign flips of the differences, times the size of the family; NaN below two seeds.
        exact: whether there are enough seeds for the exact test: it could reject with several outcomes.
        spread: standard deviation of a difference that the interval uses.
        smallest: true difference that this design shows in 80 % of all cases.
        freedom_per_seed: degrees of freedom of the spread, over n − 1.
    """

    interval: Interval
    p: float
    p_exact: float
    exact: bool
    spread: float
    smallest: float
    family: int
    freedom_per_seed: float

    @property
    def differs(self) -> bool:
        """Whether a difference may be claimed: the interval says so, and an exact test if there is one."""
        return self.interval.excludes(0) and not (self.exact and self.p_exact > 1 - self.interval.level)

    @property
    def undecided(self) -> bool:
        """Whether the interval leaves out zero, and the exact test does not."""
        return self.interval.excludes(0) and not self.differs

    def seeds_needed(self, difference: float) -> int | None:
        """Seeds with which ``difference`` is seen in 80 % of cases; None if unknown or above `MOST_SEEDS`."""
        if not (math.isfinite(self.spread) and self.spread > 0 and difference > 0):
            return None

        def enough(n: int) -> bool:
            freedom, own = (n - 1) * self.freedom_per_seed, n - 1 if self.freedom_per_seed > 1 else 0
            return detectable(freedom, self.family, own) * self.spread / math.sqrt(n) <= difference

        if not enough(MOST_SEEDS):
            return None
        low, high = 1, MOST_SEEDS  # more seeds see smaller differences
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


def judge(groups: Sequence[ArrayLike], family: int = 0, level: float = LEVEL) -> list[Judgement]:
    """Mean of each group of paired differences to one reference, one difference a seed; NaNs are left out.

    ``mean ± t(1 − α/2m; ν)·max(s, s̄)/√n`` for a family of m: s is the group's own standard deviation, s̄² the
    mean variance of all groups, and ``ν = Σ(n_j − 1)/(1 + 0.35·(k − 1))`` the degrees of freedom of s̄² for
    k groups, whose variances share the reference's.

    Args:
        family: at least the number of groups, which is the default.
    """
    arrays = [x[np.isfinite(x)] for x in (np.asarray(g, dtype=float).ravel() for g in groups)]
    usable = [x for x in arrays if len(x) > 1]
    degrees = sum(len(x) - 1 for x in usable)
    pooled = sum((len(x) - 1) * float(x.var(ddof=1)) for x in usable) / degrees if degrees else 0.0
    shared = 1 + _SHARED * (len(usable) - 1)
    freedom = degrees / shared
    family = max(family, len(arrays))
    return [_judgement(x, pooled, freedom, len(usable) / shared, family, level) for x in arrays]


def _judgement(
    x: Array, pooled: float, freedom: float, per_seed: float, family: int, level: float
) -> Judgement:
    size = float(np.abs(x).max()) if len(x) else 0.0
    estimate = rounded(float(x.mean()), size) if len(x) else math.nan
    spread = rounded(math.sqrt(max(float(x.var(ddof=1)), pooled)), size) if len(x) > 1 else math.nan
    p_exact = math.nan if len(x) < 2 else min(1.0, rounded(family * sign_flip_p(x)))
    exact = _ARRANGEMENTS * family * 2.0 ** (1 - len(x)) <= 1 - level
    why = ""
    if len(x) < 2:
        why = "no interval: no pair of runs" if len(x) == 0 else "no interval: one seed"
    elif spread == 0 and estimate != 0:
        why = "no interval: all seeds differ by the same, so that the spread is not known"
    if why:
        unknown = Interval(estimate, math.nan, math.nan, level, len(x), why)
        return Judgement(unknown, math.nan, p_exact, exact, spread, math.nan, family, per_seed)
    error = spread / math.sqrt(len(x))
    half = critical(freedom, family, level) * error
    low, high = (rounded(estimate + sign * half, size) for sign in (-1, 1))
    p = 1.0 if error == 0 else min(1.0, family * 2 * float(special.stdtr(freedom, -abs(estimate) / error)))
    interval = Interval(
        estimate,
        low,
        high,
        level,
        len(x),
        f"paired t, simultaneous over {family}" if family > 1 else "paired t",
    )
    own = len(x) - 1 if per_seed > 1 else 0
    smallest = rounded(detectable(freedom, family, own, level) * error) if error else math.nan
    return Judgement(interval, rounded(p), p_exact, exact, spread, smallest, family, per_seed)


@lru_cache(maxsize=4096)
def detectable(
    freedom: float, family: int, own: int = 0, level: float = LEVEL, power: float = POWER
) -> float:
    """Smallest true difference, in standard errors, that is shown in ``power`` of all cases.

    Solves ``P(|T| > c) = power`` for noncentral t, with the distribution of the estimated variance in 1,000
    equal slices (scipy's own is not reliable at two degrees of freedom and large c).

    Args:
        own: degrees of freedom of the comparison's own variance, if the larger of the two is used.
    """
    limit = critical(freedom, family, level)
    edges = limit * np.sqrt(_variances(freedom, own))

    def missing(shift: float) -> float:
        return float(np.mean(special.ndtr(shift - edges) + special.ndtr(-edges - shift))) - power

    highest = 4 * float(edges.max()) + 10
    return rounded(float(optimize.brentq(missing, 0.0, highest, xtol=1e-9)), 1.0)


@lru_cache(maxsize=4096)
def _variances(freedom: float, own: int) -> Array:
    """The variance that is used over the true one: the middles of 1,000 equally likely slices. Of two, which
    are taken for independent, the larger."""
    slices = (np.arange(1000) + 0.5) / 1000
    if not own:
        return np.asarray(2 * special.gammaincinv(freedom / 2, slices) / freedom)
    places = np.geomspace(1e-4, 1e3, 4000)
    below = special.chdtr(freedom, places * freedom) * special.chdtr(own, places * own)
    return np.asarray(np.interp(slices, below, places))


def mean_over_conditions(groups: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Each seed's mean over the conditions, of the seeds that have a difference under every one of them."""
    if not groups:
        return {}
    shared = [seed for seed in groups[0] if all(seed in group for group in groups)]
    return {seed: float(np.mean([group[seed] for group in groups])) for seed in shared}
