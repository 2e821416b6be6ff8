"""Statistics against scipy, formulas and hand-worked examples; coverage by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatbench.report.analysis import statistics
from flatbench.report.analysis.correlation import GranulatedKendall, Kendall, Spearman, correlate
from flatbench.report.analysis.statistics import (
    clustered_jackknife,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    sign_flip_p,
)

RNG = np.random.default_rng(7)


def ones(n: int) -> np.ndarray:
    return np.ones((1, n))


@pytest.mark.parametrize("seed", range(5))
def test_a_cluster_left_out_is_one_of_weight_zero(seed: int) -> None:
    """To the bit: both are sums of whole numbers."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(12, 40))
    x, y = rng.integers(0, 6, count).astype(float), rng.normal(size=count)
    strata, clusters = rng.integers(0, 3, count), np.sort(rng.integers(0, 5, count))
    clusters = rng.permutation(np.unique(clusters, return_inverse=True)[1])
    grid = pd.DataFrame({"lr": rng.integers(0, 3, count), "rho": rng.integers(0, 3, count)})
    without = (1.0 - np.eye(clusters.max() + 1))[:, clusters]
    for coefficient in (Kendall(x, y, strata), GranulatedKendall(x, y, grid)):
        np.testing.assert_array_equal(coefficient.without(clusters), coefficient(without))


def test_sign_flips_are_all_counted() -> None:
    d = np.array([0.3, -0.1, 0.5, 0.2, 0.05])
    extreme = [
        abs(np.dot(signs, d)) >= abs(d.sum()) - 1e-12 for signs in itertools.product((1, -1), repeat=len(d))
    ]
    assert sign_flip_p(d) == pytest.approx(np.mean(extreme), abs=1e-12)
    assert sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(0.25)
    assert math.isnan(sign_flip_p([]))
    assert sign_flip_p([3.0]) == sign_flip_p([0.0, 0.0, 0.0]) == 1.0


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([100, 1, 2, 3, 4, 5, 6, -50]) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_probability_of_improvement_counts_pairs() -> None:
    a, b = [RNG.integers(0, 4, 5), RNG.integers(0, 4, 3)], [RNG.integers(0, 4, 4), RNG.integers(0, 4, 6)]
    expected = np.mean(
        [np.mean([(x > y) + (x == y) / 2 for x in xs for y in ys]) for xs, ys in zip(a, b, strict=True)]
    )
    assert probability_of_improvement(a, b) == pytest.approx(expected, abs=1e-12)
    assert probability_of_improvement([[1, 1]], [[1, 1]]) == 0.5


def test_performance_profile_counts_runs() -> None:
    scores = [[0.1, 0.5, 0.9], [0.4, 0.6]]
    expected = [(1 + 1) / 2, (2 / 3 + 1 / 2) / 2, 0]
    assert performance_profile(scores, [0.0, 0.45, 0.95]) == pytest.approx(expected)


def test_rank_correlations_are_scipys() -> None:
    x = RNG.integers(0, 12, 60).astype(float)
    y = x + RNG.integers(0, 12, 60)
    assert Kendall(x, y)(ones(60))[0] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-8)
    assert Spearman(x, y)(ones(60))[0] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-8)


def test_integer_weights_are_repeated_values() -> None:
    """Spearman's with weights is Spearman's of the repeated values; Kendall's leaves copies of a run out."""
    x, y = RNG.normal(size=12), RNG.normal(size=12)
    weights = RNG.integers(0, 4, 12)
    repeated = np.repeat(np.arange(12), weights)
    expected = stats.spearmanr(x[repeated], y[repeated]).statistic
    assert Spearman(x, y)(weights[None].astype(float))[0] == pytest.approx(expected, abs=1e-6)
    pairs = [(i, j) for i, j in itertools.combinations(repeated, 2) if i != j]
    signs = [np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]
    assert Kendall(x, y)(weights[None].astype(float))[0] == pytest.approx(np.mean(signs), abs=1e-6)


def test_partial_correlation_is_that_of_residuals_of_ranks() -> None:
    z = RNG.normal(size=80)
    x, y = z + RNG.normal(size=80), z + RNG.normal(size=80)
    rx, ry, rz = (stats.rankdata(v) for v in (x, y, z))
    design = np.stack([np.ones(80), rz], axis=1)
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (rx, ry)]
    expected = np.corrcoef(residuals[0], residuals[1])[0, 1]
    assert Spearman(x, y, z)(ones(80))[0] == pytest.approx(expected, abs=1e-6)


def test_strata_are_not_compared_with_each_other() -> None:
    """Within both strata y falls with x; over all it would rise."""
    x, y = np.array([1.0, 2, 3, 11, 12, 13]), np.array([3.0, 2, 1, 13, 12, 11])
    strata = np.array(["a"] * 3 + ["b"] * 3)
    for kind in (Kendall, Spearman):
        assert kind(x, y)(ones(6))[0] > 0
        assert kind(x, y, strata=strata)(ones(6))[0] == pytest.approx(-1)


#: lr, rho, x, y of six runs
HAND = [(1, 1, 1, 1), (1, 2, 2, 0), (2, 1, 3, 2), (2, 2, 4, 5), (3, 1, 0, 3), (3, 2, 5, 6)]


def test_granulated_tau_by_hand() -> None:
    """lr moves at rho 1: pairs +, −, − (τ −1/3); at rho 2: all + (τ 1); ψ_lr = 1/3.
    rho moves at lr 1: −; at lr 2: +; at lr 3: +; ψ_rho = 1/3. Ψ = 1/3."""
    lr, rho, x, y = (np.array(column, dtype=float) for column in zip(*HAND, strict=True))
    granulated = GranulatedKendall(x, y, pd.DataFrame({"lr": lr, "rho": rho}))
    axes = granulated.axes(ones(6))
    assert axes["lr"][0] == pytest.approx(1 / 3)
    assert axes["rho"][0] == pytest.approx(1 / 3)
    assert granulated(ones(6))[0] == pytest.approx(1 / 3)


def test_granulated_tau_against_plain_loops() -> None:
    frame = pd.DataFrame(
        itertools.product(range(3), range(4), ("p", "q"), (0, 1)), columns=["lr", "rho", "schedule", "seed"]
    )
    frame = frame[RNG.uniform(size=len(frame)) < 0.8].reset_index(drop=True)
    x, y = RNG.integers(0, 9, len(frame)).astype(float), RNG.integers(0, 9, len(frame)).astype(float)
    psis = []
    for axis in ("lr", "rho", "schedule"):
        taus = []
        for _, group in frame.groupby([c for c in frame if c != axis]):
            pairs = list(itertools.combinations(group.index, 2))
            if pairs:
                taus.append(np.mean([np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs]))
        psis.append(np.mean(taus))
    granulated = GranulatedKendall(x, y, frame[["lr", "rho", "schedule"]], frame[["seed"]])
    assert granulated(ones(len(frame)))[0] == pytest.approx(np.mean(psis), abs=1e-8)


def test_no_hyper_parameter_moves_alone() -> None:
    frame = pd.DataFrame({"lr": [1, 2], "rho": [1, 2]})
    granulated = GranulatedKendall([1.0, 2.0], [1.0, 2.0], frame)
    assert granulated.names == []
    assert math.isnan(granulated(ones(2))[0])


def runs(
    rng: np.random.Generator, grid: tuple[int, int], seeds: int, rho: float, share: float
) -> pd.DataFrame:
    """Final runs of a grid: x and y correlate by ``share·rho`` between configurations of one study."""
    count = grid[0] * grid[1]
    shared = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], count)
    own = rng.standard_normal((count, seeds, 2))
    values = np.sqrt(share) * shared[:, None] + np.sqrt(1 - share) * own
    configuration = np.repeat(np.arange(count), seeds)
    frame = pd.DataFrame(
        {
            "condition": "",
            "method": "sam",
            "configuration": configuration.astype(str),
            "seed": np.tile(np.arange(seeds), count),
            "lr": configuration // grid[1],
            "rho": configuration % grid[1],
            "x": values[..., 0].ravel(),
            "y": values[..., 1].ravel(),
        }
    )
    frame["train.loss"] = 0.5 * frame["x"] + 0.5 * rng.standard_normal(len(frame))
    return frame


def test_correlate_gives_every_coefficient() -> None:
    frame = runs(np.random.default_rng(0), (5, 4), 3, 0.9, 0.9)
    found = correlate(frame, "x", "y", ["lr", "rho"])
    names = ["granulated_kendall", "equal_lr", "kendall", "spearman", "partial_spearman"]
    assert list(found.by_name) == names[:1] + names[2:]  # without a hyper.lr there is no level of it
    assert (found.runs, found.configurations, found.unit) == (60, 20, "runs")
    for interval in found.by_name.values():
        assert interval.low < interval.estimate < interval.high
        assert interval.excludes(0)
    few = correlate(frame[frame["lr"] < 4], "x", "y", ["lr", "rho"])
    assert not any(interval.known for interval in few.by_name.values())
    assert few.by_name["kendall"].method == "no interval: 16 configurations, 20 are needed"
    assert correlate(frame.head(2), "x", "y", ["lr"]).by_name == {}


def test_many_runs_are_averaged_over_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = runs(np.random.default_rng(0), (6, 5), 4, 0.9, 0.9)
    monkeypatch.setattr("flatbench.report.analysis.correlation.MAX_RUNS", 100)
    found = correlate(frame, "x", "y", ["lr", "rho"])
    assert (found.unit, found.runs, found.configurations) == ("means over seeds", 120, 30)
    means = frame.groupby("configuration")[["x", "y"]].mean()
    expected = stats.kendalltau(means["x"], means["y"]).statistic
    assert found.by_name["kendall"].estimate == pytest.approx(expected, abs=1e-8)


def covered(intervals: list[statistics.Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_false_positives_of_the_sign_flip_test() -> None:
    rng = np.random.default_rng(0)
    p = np.array([sign_flip_p(rng.standard_t(4, 8)) for _ in range(400)])
    assert np.mean(p <= 0.05) <= 0.07


@pytest.mark.long
@pytest.mark.parametrize(
    ("grid", "seeds", "rho", "share"),
    [((5, 4), 3, 0.0, 0.7), ((5, 4), 3, 0.6, 0.7), ((5, 4), 5, 0.9, 0.9), ((8, 5), 5, 0.6, 0.7)],
)
def test_coverage_of_rank_correlations(grid: tuple[int, int], seeds: int, rho: float, share: float) -> None:
    """Against the closed forms of a bivariate normal: τ = 2/π·asin r, ρ = 6/π·asin(r/2).

    The granulated coefficient's interval is conservative (few runs differ in one hyper-parameter alone) and
    the report says so; its truth is the mean over the simulations, since its estimator has no bias.
    """
    rng = np.random.default_rng(1)
    found: dict[str, list[statistics.Interval]] = {}
    for _ in range(1000):
        for name, interval in correlate(
            runs(rng, grid, seeds, rho, share), "x", "y", ["lr", "rho"]
        ).by_name.items():
            found.setdefault(name, []).append(interval)
    r = share * rho
    assert 0.93 <= covered(found["kendall"], 2 / math.pi * math.asin(r)) <= 0.97
    assert 0.93 <= covered(found["spearman"], 6 / math.pi * math.asin(r / 2)) <= 0.97
    for name, highest in (("partial_spearman", 0.97), ("granulated_kendall", 1.0)):
        truth = float(np.mean([interval.estimate for interval in found[name]]))
        assert 0.93 <= covered(found[name], truth) <= highest


def test_a_percentile_bootstrap_of_five_seeds_would_not_cover() -> None:
    """Why means over seeds do not use it."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(600):
        x = rng.normal(0, 1, 5)
        means = x[rng.integers(0, 5, (400, 5))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        hits.append(low <= 0 <= high)
    assert np.mean(hits) < 0.9


def test_jackknife_of_a_perfect_correlation_is_finite() -> None:
    x = np.arange(25.0)
    found = clustered_jackknife(Kendall(x, x), np.arange(25))
    assert found.estimate == 1.0
    assert 0.99 < found.low <= found.high <= 1.0
