"""Tables of differences, aggregates and correlations, with how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from flatbench.report.analysis.evidence import (
    GENERALIZATION_COLUMNS,
    LEVEL,
    comparisons,
    correlations,
    difference_scale,
    shared_metric,
)
from flatbench.report.analysis.quantities import Metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import Interval, interquartile_mean, probability_of_improvement
from flatbench.report.numbers import fixed, significant
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number

_COEFFICIENTS = {
    "kendall": "Kendall's τ",
    "granulated_kendall": "Granulated Kendall's τ",
    "spearman": "Spearman's ρ",
    "partial_spearman": "Partial Spearman's ρ given training loss",
}


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


def correlations_table(results: Results) -> Table | None:
    """Correlations of flatness with generalization, across methods first, then within each."""
    data = correlations(results)
    if data.empty:
        return None
    parts = [
        Part(f"{results.name}: {title}", _correlation_table(results, rows))
        for title, rows in (
            ("across methods", data[data["method"] == ""]),
            ("within one method", data[data["method"] != ""]),
        )
        if len(rows)
    ]
    return Table("correlations", "Flatness and generalization", data, parts)


def _correlation_table(results: Results, data: pd.DataFrame) -> pd.DataFrame:
    lines: list[dict[str, Cell]] = []
    keys = ["header", "against", "condition", "method"]
    for (header, against, condition, method), rows in data.groupby(keys, sort=False):
        line = {"Flatness": Cell(str(header)), "Correlated with": Cell(GENERALIZATION_COLUMNS[str(against)])}
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
