"""Correlations and aggregates of made-up studies against scipy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatbench.report.analysis.differences import ALL
from flatbench.report.analysis.evidence import correlations
from flatbench.report.analysis.statistics import interquartile_mean
from flatbench.report.tables.evidence import aggregates_table, correlations_table
from tests.report.synthetic import plain, results

METHODS = [f"m{i}" for i in range(8)]


def noisy(shift: float, spread: float) -> Any:
    """sam is better than lora by ``shift`` on average; differences of a seed spread by ``spread``."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(1000 * seed + len(condition))
        base, extra = rng.normal(0.7, 0.05), rng.normal(shift, spread)
        test = base + (extra if method == "sam" else 0.0)
        return {**plain(method, condition, seed, choice), "test": float(test)}

    return outcomes


def related(sign: float) -> Any:
    """Sharper runs test higher (sign 1) or lower (sign -1), or independently (sign 0)."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([int(method[1:]), int(1e4 * choice["lr"]), seed])
        sharpness = 1 + rng.uniform()
        test = 0.5 + 0.1 * sign * sharpness + 0.02 * rng.normal()
        return {**plain(method, condition, seed, choice), "sharpness": sharpness, "test": float(test)}

    return outcomes


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
    # under two conditions a configuration is still one
    assert frame.query(f"condition == '{ALL}' and method == ''")["configurations"].item() == 12
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
