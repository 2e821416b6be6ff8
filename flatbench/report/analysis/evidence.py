"""Differences to the baseline, and correlations of sharpness with generalization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pandas as pd

from flatbench.report.analysis.correlation import Correlations, correlate
from flatbench.report.analysis.quantities import Metric, flatness, metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import holm, paired_difference, stratified_mean_interval

ALL = "all conditions"
LEVEL = 0.95


def shared_metric(results: Results) -> Metric | None:
    """How the main metric is shown if all conditions show theirs on one scale, else None."""
    shown = [metric(str(name)) for name in results.final["metric"].dropna().unique()]
    if not shown or len({(m.scale, m.unit) for m in shown}) > 1:
        return None
    return (
        shown[0] if len(shown) == 1 else Metric("metric", shown[0].scale, shown[0].unit, shown[0].difference)
    )


@lru_cache(maxsize=2)
def comparisons(results: Results) -> pd.DataFrame:
    """Every method's test metric minus the baseline's, paired by seed, in the stored unit.

    A row a condition and method, and with several conditions on one scale a block of `ALL` of them. Columns:
    ``condition``, ``method``, ``baseline``, ``metric``, ``difference``, ``low``, ``high`` (NaN where there is
    no interval), ``n`` (pairs), ``p_value`` (sign-flip), ``p_holm`` (adjusted over the methods of the block).
    """
    base = results.baseline
    runs = results.representatives
    if base is None or runs.empty or not ((runs["method"] == base) & runs["test"].notna()).any():
        return pd.DataFrame()
    blocks = []
    for condition in results.conditions:
        own = runs[runs["condition"] == condition]
        scores = own.pivot_table(index="seed", columns="method", values="test", dropna=False)
        if base in scores:
            name = next(iter(own["metric"].dropna()), None)
            others = [m for m in results.methods if m != base and m in scores]
            rows = [_comparison_row(condition, m, base, name, [scores[m] - scores[base]]) for m in others]
            blocks.append(_adjust_p_values(rows))
    if len(results.conditions) > 1 and shared_metric(results) is not None:
        blocks.append(_adjust_p_values(list(_condition_average_rows(results, runs, base))))
    return pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame()


def _condition_average_rows(results: Results, runs: pd.DataFrame, base: str) -> Iterator[dict[str, Any]]:
    scores = runs.pivot_table(index=["condition", "seed"], columns="method", values="test", dropna=False)
    for method in results.methods:
        if method != base and method in scores and base in scores:
            difference = (scores[method] - scores[base]).dropna()
            groups = [group for _, group in difference.groupby(level="condition")]
            if len(groups) == len(results.conditions):
                yield _comparison_row(ALL, method, base, None, groups)


def _comparison_row(condition: str, method: str, base: str, name: Any, groups: list[Any]) -> dict[str, Any]:
    """One comparison over one group of paired differences or several."""
    together = pd.concat(groups).dropna()
    paired = paired_difference(together, [0.0] * len(together), LEVEL)
    interval = paired.difference if len(groups) == 1 else stratified_mean_interval(groups, LEVEL)
    return {
        "condition": condition,
        "method": method,
        "baseline": base,
        "metric": name,
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "p_value": paired.p_value,
        "interval": interval.method,
    }


def _adjust_p_values(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    return frame.assign(p_holm=holm(frame["p_value"])) if len(frame) else frame


def difference_scale(results: Results, row: Mapping[Any, Any]) -> Metric:
    """How a comparison's numbers are shown."""
    shared = shared_metric(results)
    return metric(str(row["metric"])) if row["condition"] != ALL or shared is None else shared


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
    narrow = final[[c for c in wanted if c in final]]  # hundreds of columns take long to select rows from
    for quantity in flatness(results):
        numbers = narrow.assign(x=pd.to_numeric(final[quantity.column], errors="coerce").astype(float))
        for condition, method in scopes:
            chosen = numbers if condition == ALL else numbers[numbers["condition"] == condition]
            chosen = chosen[chosen["method"] == method] if method else chosen
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
