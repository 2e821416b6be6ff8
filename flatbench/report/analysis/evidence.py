"""What the results carry: differences to the baseline, correlations with flatness, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import pandas as pd

from flatbench.report.analysis.correlation import Correlations, correlate
from flatbench.report.analysis.quantities import Metric, flatness, metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import (
    Interval,
    holm,
    interquartile_mean,
    paired_difference,
    probability_of_improvement,
    stratified_mean_interval,
)
from flatbench.report.numbers import fixed, significant
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number

ALL = "all conditions"
LEVEL = 0.95
_COEFFICIENTS = {
    "kendall": "Kendall's τ",
    "granulated_kendall": "Granulated Kendall's τ",
    "spearman": "Spearman's ρ",
    "partial_spearman": "Partial Spearman's ρ given training loss",
}


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
            rows = [_compared(condition, m, base, name, [scores[m] - scores[base]]) for m in others]
            blocks.append(_adjusted(rows))
    if len(results.conditions) > 1 and shared_metric(results) is not None:
        blocks.append(_adjusted(list(_over_conditions(results, runs, base))))
    return pd.concat(blocks, ignore_index=True) if blocks else pd.DataFrame()


def _over_conditions(results: Results, runs: pd.DataFrame, base: str) -> Iterator[dict[str, Any]]:
    scores = runs.pivot_table(index=["condition", "seed"], columns="method", values="test", dropna=False)
    for method in results.methods:
        if method != base and method in scores and base in scores:
            difference = (scores[method] - scores[base]).dropna()
            groups = [group for _, group in difference.groupby(level="condition")]
            if len(groups) == len(results.conditions):
                yield _compared(ALL, method, base, None, groups)


def _compared(condition: str, method: str, base: str, name: Any, groups: list[Any]) -> dict[str, Any]:
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


def _adjusted(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    return frame.assign(p_holm=holm(frame["p_value"])) if len(frame) else frame


def comparisons_table(results: Results) -> Table | None:
    """Differences to the baseline with interval and p value."""
    data = comparisons(results)
    if data.empty:
        return None
    columns: dict[str, list[Cell]] = {}
    if len(results.conditions) > 1:
        columns["Condition"] = [Cell(text) for text in data["condition"]]
    shown = [difference_scale(results, row) for row in data.to_dict("records")]
    units = {m.difference for m in shown}
    unit = f" ({units.pop()})" if len(units) == 1 and "" not in units else ""
    columns |= {
        "Method": [Cell(text) for text in data["method"]],
        f"Test metric minus {results.baseline}'s, 95 % interval{unit}": [
            interval_cell(_interval(row), m) for row, m in zip(data.to_dict("records"), shown, strict=True)
        ],
        "Pairs": [Cell(str(n), value=float(n)) for n in data["n"]],
        "p (sign-flip test)": [p_cell(p) for p in data["p_value"]],
        "p after Holm's correction": [p_cell(p) for p in data["p_holm"]],
    }
    return Table(
        "comparisons", f"Difference to {results.baseline}", data, [Part(results.name, pd.DataFrame(columns))]
    )


def difference_scale(results: Results, row: Mapping[Any, Any]) -> Metric:
    """How a comparison's numbers are shown."""
    shared = shared_metric(results)
    return metric(str(row["metric"])) if row["condition"] != ALL or shared is None else shared


def _interval(row: Mapping[Any, Any]) -> Interval:
    return Interval(row["difference"], row["low"], row["high"], LEVEL, row["n"], row["interval"])


def interval_cell(interval: Interval, shown: Metric | None = None) -> Cell:
    """The estimate with its interval, or with why there is none."""
    if math.isnan(interval.estimate):
        return Cell(ABSENT)
    scale = shown.scale if shown else 1.0
    decimals = 1 if shown and shown.unit else 3 if shown else 2
    text = fixed(interval.estimate * scale, decimals, sign=True)
    if not interval.known:
        return Cell(text, remark="no interval", value=interval.estimate)
    low, high = (fixed(v * scale, decimals, sign=True) for v in (interval.low, interval.high))
    return Cell(text, remark=f"{low} to {high}", value=interval.estimate * scale)


def p_cell(p: float) -> Cell:
    """A p value with two significant digits."""
    return Cell(ABSENT if math.isnan(p) else "< 0.001" if p < 0.001 else significant(p, 2), value=p)


def aggregates_table(results: Results) -> Table | None:
    """Methods over all conditions: mean, interquartile mean, probability of improvement over the baseline."""
    shown, base = shared_metric(results), results.baseline
    if len(results.conditions) < 2 or shown is None:
        return None
    runs = results.representatives
    scores = {
        m: [runs.loc[(runs["method"] == m) & (runs["condition"] == c), "test"] for c in results.conditions]
        for m in results.methods
    }
    rows = []
    for name, groups in scores.items():
        known = [g.dropna() for g in groups]
        whole = all(map(len, known))
        rows.append(
            {
                "method": name,
                "mean": float(pd.Series([g.mean() for g in known]).mean()) if whole else math.nan,
                "interquartile_mean": interquartile_mean(pd.concat(known)) if whole else math.nan,
                "probability_of_improvement": probability_of_improvement(groups, scores[base])
                if base and name != base
                else math.nan,
                "conditions": sum(map(bool, map(len, known))),
            }
        )
    data = pd.DataFrame(rows)
    decimals = 1 if shown.unit else 3

    def cells(column: str, scale: float, places: int) -> list[Cell]:
        return [
            Cell(ABSENT if math.isnan(v) else number(v * scale, decimals=places)[0], value=v)
            for v in data[column]
        ]

    columns = {
        "Method": [Cell(name) for name in data["method"]],
        shown.header("Mean test"): cells("mean", shown.scale, decimals),
        shown.header("Interquartile mean test"): cells("interquartile_mean", shown.scale, decimals),
        f"Probability of improvement over {base}": cells("probability_of_improvement", 1.0, 2),
        "Conditions": [Cell(str(n), value=float(n)) for n in data["conditions"]],
    }
    return Table("aggregates", "Over all conditions", data, [Part(results.name, pd.DataFrame(columns))])


_AGAINST = {
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
    wanted = ["condition", "method", "configuration", "seed", *_AGAINST, *hyper, "train.loss"]
    narrow = final[[c for c in wanted if c in final]]  # hundreds of columns take long to select rows from
    for quantity in flatness(results):
        numbers = narrow.assign(x=pd.to_numeric(final[quantity.column], errors="coerce").astype(float))
        for condition, method in scopes:
            chosen = numbers if condition == ALL else numbers[numbers["condition"] == condition]
            chosen = chosen[chosen["method"] == method] if method else chosen
            for against in _AGAINST:
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


def correlations_table(results: Results) -> Table | None:
    """Correlations of flatness with generalization, across methods first, then within each."""
    data = correlations(results)
    if data.empty:
        return None
    parts = [
        Part(f"{results.name}: {title}", _shown_correlations(results, rows))
        for title, rows in (
            ("across methods", data[data["method"] == ""]),
            ("within one method", data[data["method"] != ""]),
        )
        if len(rows)
    ]
    return Table("correlations", "Flatness and generalization", data, parts)


def _shown_correlations(results: Results, data: pd.DataFrame) -> pd.DataFrame:
    lines: list[dict[str, Cell]] = []
    keys = ["header", "against", "condition", "method"]
    for (header, against, condition, method), rows in data.groupby(keys, sort=False):
        line = {"Flatness": Cell(str(header)), "Correlated with": Cell(_AGAINST[str(against)])}
        if len(results.conditions) > 1:
            line["Condition"] = Cell(str(condition))
        if method:
            line["Method"] = Cell(str(method))
        by_name = {row["coefficient"]: row for row in rows.to_dict("records")}
        for name, title in _COEFFICIENTS.items():
            row = by_name.get(name)
            line[f"{title} (95 % interval)"] = (
                Cell(ABSENT) if row is None else interval_cell(_as_interval(row))
            )
        line["Configurations"] = Cell(
            str(rows["configurations"].iloc[0]), value=float(rows["configurations"].iloc[0])
        )
        line["Runs"] = Cell(str(rows["runs"].iloc[0]), value=float(rows["runs"].iloc[0]))
        lines.append(line)
    return pd.DataFrame(lines)


def _as_interval(row: Mapping[Any, Any]) -> Interval:
    return Interval(row["estimate"], row["low"], row["high"], LEVEL, row["configurations"], row["interval"])
