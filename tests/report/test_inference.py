"""Intervals, p values and power of differences; levels of a relation; error rates by simulation.

The full simulation is benchmarks/inference.py; here are its functions on fewer studies.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatbench.report.analysis.correlation import within_p_value
from flatbench.report.analysis.inference import Judgement, detectable, judge, mean_over_conditions
from flatbench.report.analysis.relations import relation

ROOT = Path(__file__).parents[2]
HYPER = ["hyper.lr", "hyper.rho"]


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("inference_benchmark", ROOT / "benchmarks/inference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()


def one(differences: Any, family: int = 1) -> Judgement:
    (found,) = judge([differences], family)
    return found


def test_one_comparison_is_the_paired_t_test() -> None:
    x = [0.3, -0.1, 0.5, 0.2, 0.05]
    found, expected = one(x), stats.ttest_1samp(x, 0)
    limits = expected.confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((limits.low, limits.high))
    assert found.p == pytest.approx(expected.pvalue)


def test_the_larger_spread_counts() -> None:
    quiet, loud = np.array([0.10, 0.11, 0.12]), np.array([-0.5, 0.0, 0.5])
    pooled = math.sqrt((quiet.var(ddof=1) + loud.var(ddof=1)) / 2)
    first, second = judge([quiet, loud])
    assert first.spread == pytest.approx(pooled)
    assert second.spread == pytest.approx(0.5)


@pytest.mark.parametrize("family", [1, 3, 20])
def test_interval_and_p_say_the_same(family: int) -> None:
    rng = np.random.default_rng(family)
    for _ in range(200):
        for found in judge(list(rng.normal(rng.normal(0, 2), 1, (3, 4))), family):
            assert found.interval.excludes(0) == (found.p < 0.05)


def test_what_has_no_interval_says_why() -> None:
    assert one([0.2]).interval.method == "no interval: one seed"
    assert one([math.nan, math.nan]).interval.method == "no interval: no pair of runs"
    assert "all seeds differ by the same" in one([0.1, 0.1, 0.1]).interval.method
    equal = one([0.0, 0.0, 0.0])
    assert (equal.interval.low, equal.interval.high, equal.differs) == (0, 0, False)
    assert one([0.1, math.nan, 0.3]).interval.n == 2


def test_an_exact_test_that_disagrees_stops_the_claim() -> None:
    """Thirteen differences, one far out on the other side: t is not misled here, a claim needs both."""
    x = np.r_[np.full(12, 1.0) + np.linspace(-0.01, 0.01, 12), -0.9]
    found = one(x)
    assert found.exact
    assert found.differs == (found.interval.excludes(0) and found.p_exact <= 0.05)
    assert found.differs != found.undecided or not found.interval.excludes(0)
    assert not one(np.ones(5) + np.arange(5) / 9).exact  # five seeds cannot bring it below 0.05


def test_visible_at_80_percent_is_what_textbooks_say() -> None:
    """A paired t test of ten pairs sees a difference of one standard deviation in 80.3 % of all cases."""
    assert detectable(9, 1) / math.sqrt(10) == pytest.approx(1.0, abs=0.01)
    found = one([0.0, 1.0, 2.0, 1.5, 0.5, 1.2])
    n = found.seeds_needed(0.5)
    assert n is not None
    assert detectable(n - 1, 1) * found.spread / math.sqrt(n) <= 0.5
    assert detectable(n - 2, 1) * found.spread / math.sqrt(n - 1) > 0.5
    assert one([0.0, 1.0]).seeds_needed(1e-6) is None


def test_a_seed_counts_once_over_conditions() -> None:
    assert mean_over_conditions([{0: 1.0, 1: 3.0}, {0: 3.0, 2: 1.0}]) == {0: 2.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("methods", "seeds", "spread", "noise"),
    [
        (3, 3, "unstable reference", "normal"),
        (12, 3, "equally stable", "normal"),
        (7, 5, "from 0.3 to 3", "normal"),
    ],
)
def test_false_claims_of_a_study(methods: int, seeds: int, spread: str, noise: str) -> None:
    """At most 5 % in the benchmark; 300 studies leave 2.5 standard errors."""
    found = BENCHMARK.compare(300, methods, seeds, spread, noise)
    assert found["false_claims"] <= 0.08
    assert found["coverage"] >= 0.92


@pytest.mark.slow
@pytest.mark.parametrize(("methods", "configurations", "effect"), [(3, 6, 2.0), (6, 6, 0.0), (6, 6, 2.0)])
def test_false_signs(methods: int, configurations: int, effect: float) -> None:
    found = BENCHMARK.relate(100, methods, configurations, effect)
    assert found["false_signs"] <= 0.06
    assert min(v for v in found["coverage"].values() if v is not None) >= 0.89
    if effect:  # why reports no longer take configurations of one method for independent
        assert found["pooled_false_signs"] > 0.1


def test_the_committed_figures_hold_the_goal() -> None:
    found = json.loads((ROOT / "benchmarks/results/inference.json").read_text())
    assert found["worst"]["false_signs"] <= 0.06
    assert found["worst"]["false_claims_normal"] <= 0.06
    grid = {(row["methods"], row["configurations"], row["effect"]) for row in found["relation"]}
    assert {(3, 3, 0.0), (3, 30, 2.0), (12, 3, 2.0), (12, 30, 0.0), (12, 30, 2.0)} <= grid


def many(**options: Any) -> pd.DataFrame:
    return BENCHMARK.study(np.random.default_rng(3), **options)


def test_simpson_is_seen() -> None:
    found = relation(
        many(methods=8, configurations=6, effect=2.0, relation=-0.9, shared=0.95), "x", "y", HYPER
    )
    assert found.verdict == "between methods"
    assert found.sign == 0
    assert found.levels["kendall"].estimate > 0 > found.levels["within_kendall"].estimate


def test_levels_that_agree_have_a_sign() -> None:
    found = relation(
        many(methods=8, configurations=6, effect=1.0, relation=-0.9, shared=-0.9), "x", "y", HYPER
    )
    assert (found.verdict, found.sign) == ("sign", -1)
    assert list(found.levels) == ["granulated_kendall", "within_kendall", "equal_lr", "kendall"]


def test_the_learning_rate_is_seen_through() -> None:
    """x and y both follow the learning rate; at one rate there is nothing."""
    rng = np.random.default_rng(0)
    runs = many(methods=6, configurations=6, effect=0.1)
    runs["x"] = runs["hyper.lr"] + 0.3 * rng.standard_normal(len(runs))
    runs["y"] = runs["hyper.lr"] + 0.3 * rng.standard_normal(len(runs))
    found = relation(runs, "x", "y", HYPER)
    assert found.verdict == "learning rate"
    assert abs(found.levels["equal_lr"].estimate) < 0.2 < found.levels["within_kendall"].estimate


def test_conditions_that_contradict_each_other() -> None:
    runs = many(methods=6, configurations=6, effect=0.5, conditions=2, relation=0.95)
    runs.loc[runs["condition"] == 1, "y"] *= -1
    found = relation(runs, "x", "y", HYPER)
    assert found.verdict == "conditions"
    assert found.by_condition["0"].estimate > 0 > found.by_condition["1"].estimate


def test_the_same_configuration_under_conditions_is_one() -> None:
    once = relation(many(methods=4, configurations=6, effect=1.0), "x", "y", HYPER)
    thrice = relation(many(methods=4, configurations=6, effect=1.0, conditions=3), "x", "y", HYPER)
    assert once.configurations == thrice.configurations == 24


def test_permutation_p_is_uniform_without_a_relation() -> None:
    rng = np.random.default_rng(0)
    p = [within_p_value(BENCHMARK.study(rng, 3, 5, 2.0), "x", "y", HYPER, draws=99) for _ in range(200)]
    assert np.mean(np.array(p) <= 0.05) <= 0.10
    assert 0.4 < np.mean(p) < 0.6
    nothing = BENCHMARK.study(rng, 3, 2, 1.0)
    assert math.isnan(within_p_value(nothing, "x", "y", HYPER))
