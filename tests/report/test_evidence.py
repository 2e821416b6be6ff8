"""Comparisons and correlations of made-up studies, and the sentences that they allow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatbench.report.analysis.evidence import ALL, comparisons, correlations
from flatbench.report.analysis.statistics import interquartile_mean
from flatbench.report.tables.evidence import aggregates_table, correlations_table
from flatbench.report.text.findings import findings
from tests.report.synthetic import plain, results


def noisy(shift: float, spread: float) -> Any:
    """sam is better than lora by ``shift`` on average; differences of a seed spread by ``spread``."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(1000 * seed + len(condition))
        base, extra = rng.normal(0.7, 0.05), rng.normal(shift, spread)
        test = base + (extra if method == "sam" else 0.0)
        return {**plain(method, condition, seed, choice), "test": float(test)}

    return outcomes


def test_comparisons_are_paired_t_and_sign_flips(tmp_path: Path) -> None:
    seeds = range(5)
    data = results(tmp_path, noisy(0.03, 0.02), seeds=seeds)
    (row,) = comparisons(data).to_dict("records")
    outcomes = noisy(0.03, 0.02)
    sam = [outcomes("sam", "", s, {"lr": 0.01})["test"] for s in seeds]
    lora = [outcomes("lora", "", s, {"lr": 0.01})["test"] for s in seeds]
    expected = stats.ttest_rel(sam, lora).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), rel=1e-8)
    assert row["n"] == 5
    assert row["p_value"] in [k / 32 for k in range(33)]


def test_holm_is_over_the_methods_of_a_condition(tmp_path: Path) -> None:
    data = results(tmp_path, methods=("lora", "sam", "flat_lora"), conditions=("a", "b"))
    frame = comparisons(data)
    assert list(frame["condition"]) == ["a", "a", "b", "b", ALL, ALL]
    for _, rows in frame.groupby("condition"):
        p = sorted(rows["p_value"])
        assert min(rows["p_holm"]) == pytest.approx(min(1, 2 * p[0]))


@pytest.mark.slow
def test_a_clear_difference_is_claimed_and_an_unclear_one_is_not(tmp_path: Path) -> None:
    clear = " ".join(findings(results(tmp_path / "a", noisy(0.05, 0.005), seeds=range(6))))
    assert "interval of the difference to lora excludes zero for sam +" in clear
    unclear = " ".join(findings(results(tmp_path / "b", noisy(0.0, 0.05), seeds=range(6))))
    assert "he difference to lora is not distinguishable from zero for sam" in unclear
    assert "excludes zero" not in unclear


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    text = " ".join(findings(results(tmp_path, noisy(0.5, 0.0), seeds=(0,))))
    assert "no difference to lora has an interval" in text
    assert "excludes zero" not in text


def test_few_seeds_say_what_the_test_cannot_give(tmp_path: Path) -> None:
    text = " ".join(findings(results(tmp_path, noisy(0.05, 0.001), seeds=(0, 1, 2))))
    assert "with 3 paired seeds the sign-flip test cannot give a p below 0.25" in text


def test_no_baseline_no_comparison(tmp_path: Path) -> None:
    def renamed(method: str, *rest: Any) -> Any:
        return plain("sam", *rest)

    assert comparisons(results(tmp_path, renamed, methods=("full_ft", "sam"))).empty


def related(sign: float) -> Any:
    """Sharper runs test higher (sign 1) or lower (sign -1), or independently (sign 0)."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([int(method[1:]), int(1e4 * choice["lr"]), seed])
        sharpness = 1 + rng.uniform()
        test = 0.5 + 0.1 * sign * sharpness + 0.02 * rng.normal()
        return {**plain(method, condition, seed, choice), "sharpness": sharpness, "test": float(test)}

    return outcomes


METHODS = [f"m{i}" for i in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "words"), [(1, "a higher test metric"), (-1, "a lower test metric")])
def test_a_relation_is_named_by_its_sign(tmp_path: Path, sign: float, words: str) -> None:
    text = " ".join(findings(results(tmp_path, related(sign), methods=METHODS, tuned=False)))
    assert f"sharper minima go with {words} here" in text


@pytest.mark.slow
def test_no_relation_is_not_made_up(tmp_path: Path) -> None:
    data = results(
        tmp_path, related(0), methods=METHODS, tuned=False, measures=("sam_sharpness_merged", "cost")
    )
    text = [line for line in findings(data) if "and test metric" in line]
    assert len(text) == 1
    assert text[0].endswith("the sign is undetermined.")


@pytest.mark.slow
def test_too_few_configurations_claim_nothing(tmp_path: Path) -> None:
    text = " ".join(findings(results(tmp_path, related(1), methods=METHODS[:5])))
    assert "No relation between flatness and generalization is claimed: 5 configurations are too few" in text
    assert "sharper" not in text


@pytest.mark.slow
def test_correlations_are_scipys_within_each_scope(tmp_path: Path) -> None:
    data = results(tmp_path, related(1), methods=METHODS[:4], tuned=False, conditions=("a", "b"))
    frame = correlations(data).query("against == 'test' and coefficient == 'kendall'")
    frame = frame[frame["measure"] == "sam_sharpness_merged.sharpness"]
    final = data.final
    for row in frame[frame["condition"] != ALL].to_dict("records"):
        own = final[final["condition"] == row["condition"]]
        own = own[own["method"] == row["method"]] if row["method"] else own
        x = pd.to_numeric(own["sam_sharpness_merged.sharpness"])
        assert row["estimate"] == pytest.approx(stats.kendalltau(x, own["test"]).statistic, abs=1e-8)
        assert row["configurations"] == own["configuration"].nunique() * own["method"].nunique()
    table = correlations_table(data)
    assert table is not None
    assert [part.caption for part in table.parts] == ["demo: across methods", "demo: within one method"]


def test_aggregates(tmp_path: Path) -> None:
    data = results(tmp_path, noisy(0.05, 0.02), conditions=("a", "bb", "ccc"))
    table = aggregates_table(data)
    assert table is not None
    row = table.data.set_index("method").loc["sam"]
    tests = data.final.loc[data.final["method"] == "sam", "test"]
    assert row["mean"] == pytest.approx(tests.mean())
    assert row["interquartile_mean"] == pytest.approx(interquartile_mean(tests))
    assert 0.5 < row["probability_of_improvement"] <= 1
