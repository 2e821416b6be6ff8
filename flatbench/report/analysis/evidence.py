"""Correlations of sharpness with generalization, level by level."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.correlation import Correlations, coded, correlate, select
from flatbench.report.analysis.differences import ALL
from flatbench.report.analysis.quantities import flatness
from flatbench.report.analysis.results import Results

GENERALIZATION_COLUMNS = {
    "test": "test metric",
    "gap": "generalization gap (train − test metric)",
    "loss_gap": "loss gap (test − train loss)",
}


@lru_cache(maxsize=2)
def correlations(results: Results) -> pd.DataFrame:
    """Rank correlations of every sharpness with generalization: a row a pair, scope and coefficient.

    Scopes: every condition, and within it every method; with several conditions also `ALL` of them, where
    only runs under the same condition are compared. Columns: ``measure``, ``header``, ``against``,
    ``condition``, ``method`` ("" for across methods), ``coefficient``, ``estimate``, ``low``, ``high``,
    ``runs``, ``configurations``, ``unit``, ``interval``.
    """
    final = results.final
    hyper = [c for c in final.columns if str(c).startswith("hyper.")]
    scopes = [(c, m) for c in results.conditions for m in ("", *results.methods)]
    if len(results.conditions) > 1:
        scopes = [(ALL, m) for m in ("", *results.methods)] + scopes
    rows = []
    wanted = ["condition", "method", "configuration", "seed", *GENERALIZATION_COLUMNS, *hyper, "train.loss"]
    # hundreds of columns take long to select rows from
    narrow = coded(final[[c for c in wanted if c in final]])
    places = {c: dict(zip(final[c], narrow[c], strict=True)) for c in ("condition", "method")}
    for quantity in flatness(results):
        numbers = narrow | {"x": pd.to_numeric(final[quantity.column], errors="coerce").to_numpy(dtype=float)}
        for condition, method in scopes:
            here = np.ones(len(final), dtype=bool)
            if condition != ALL:
                here &= narrow["condition"] == places["condition"].get(condition, -1)
            if method:
                here &= narrow["method"] == places["method"].get(method, -1)
            chosen = select(numbers, here)
            for against in GENERALIZATION_COLUMNS:
                found = correlate(chosen, "x", against, hyper)
                labels = {
                    "measure": quantity.column,
                    "header": quantity.header,
                    "against": against,
                    "condition": condition,
                    "method": method,
                }
                rows += _coefficient_rows(labels, found)
    return pd.DataFrame(rows)


def _coefficient_rows(labels: dict[str, Any], found: Correlations) -> list[dict[str, Any]]:
    # within one configuration there is nothing but seeds: no relation between configurations to speak of
    if found.configurations < 3:
        return []
    return [
        {
            **labels,
            "coefficient": name,
            "estimate": interval.estimate,
            "low": interval.low,
            "high": interval.high,
            "runs": found.runs,
            "configurations": found.configurations,
            "unit": found.unit,
            "interval": interval.method,
        }
        for name, interval in found.by_name.items()
    ]
