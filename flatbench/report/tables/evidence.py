"""Tables of differences, aggregates and correlations, with how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from flatbench.report.analysis.differences import (
    difference_scale,
    differences,
    reference,
    shared_metric,
)
from flatbench.report.analysis.evidence import GENERALIZATION_COLUMNS, correlations
from flatbench.report.analysis.quantities import Metric, condition_words, lower_first
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import (
    LEVEL,
    Interval,
    interquartile_mean,
    probability_of_improvement,
)
from flatbench.report.analysis.summary import summary
from flatbench.report.numbers import fixed, off_zero, significant
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number

_COEFFICIENTS = {
    "granulated_kendall": "τ, one hyper-parameter moved at a time (granulated)",
    "within_kendall": "τ within methods",
    "equal_lr": "τ at equal learning rate",
    "kendall": "τ of all runs",
    "spearman": "Spearman's ρ",
    "partial_spearman": "Partial Spearman's ρ given training loss",
}


def comparisons_table(results: Results) -> Table | None:
    """Differences to the reference in every quantity, with simultaneous interval, p value and power."""
    data = differences(results)
    if data.empty:
        return None
    parts = []
    for header, rows in data.groupby("header", sort=False):
        entries = rows.to_dict("records")
        columns: dict[str, list[Cell]] = {}
        if len(results.conditions) > 1:
            columns["Condition"] = [Cell(condition_words(text)) for text in rows["condition"]]
        ratio = entries[0]["scale"] == "ratio"
        base = entries[0]["reference"]
        name = f"{'Over' if ratio else 'Minus'} {base}'s, 95 % interval"
        columns |= {
            "Method": [Cell(text) for text in rows["method"]],
            name: [difference_cell(results, row) for row in entries],
            "p": [p_cell(row["p"]) for row in entries],
            "Exact p": [p_cell(row["p_exact"]) if row["exact"] else Cell(ABSENT) for row in entries],
            "Seeds": [Cell(str(n), value=float(n)) for n in rows["n"]],
            "Visible at 80 % power": [_visible(results, row) for row in entries],
        }
        if rows["seeds_for_a_point"].notna().any():
            columns["Seeds for 1 point"] = [
                Cell(ABSENT) if pd.isna(n) else Cell(f"{n:.0f}", value=float(n))
                for n in rows["seeds_for_a_point"]
            ]
        parts.append(Part(f"{results.name}: {lower_first(str(header))}", pd.DataFrame(columns)))
    return Table("comparisons", f"Differences to {reference(results)}", data, parts)


def difference_cell(results: Results, row: Mapping[Any, Any]) -> Cell:
    """The estimate of a row of `differences` with its interval, or with why there is none."""
    interval = Interval(row["estimate"], row["low"], row["high"], LEVEL, row["n"], row["interval"])
    if row["quantity"] in ("test", "gap"):
        return interval_cell(interval, difference_scale(results, row))
    if math.isnan(row["estimate"]):
        return Cell(ABSENT)
    ratio = row["scale"] == "ratio"
    text = f"× {significant(row['estimate'], 3)}" if ratio else _sign_text(row["estimate"])
    if not interval.known:
        return Cell(text, remark="no interval", value=row["estimate"])
    ends = [significant(row[k], 3) if ratio else _sign_text(row[k]) for k in ("low", "high")]
    return Cell(text, remark=" to ".join(ends), value=row["estimate"])


def _sign_text(value: float) -> str:
    return f"{'+' if value > 0 else ''}{significant(value, 3)}"


def _visible(results: Results, row: Mapping[Any, Any]) -> Cell:
    value = row["smallest"]
    if not math.isfinite(value):
        return Cell(ABSENT)
    if row["scale"] == "ratio":
        return Cell(f"a factor of {significant(value, 2)}", value=value)
    if row["quantity"] in ("test", "gap"):
        shown = difference_scale(results, row)
        return Cell(fixed(value * shown.scale, 1 if shown.scale == 100 else 3), value=value * shown.scale)
    return Cell(significant(value, 2), value=value)


def interval_cell(interval: Interval, shown: Metric | None = None) -> Cell:
    """The estimate with its interval, or with why there is none."""
    if math.isnan(interval.estimate):
        return Cell(ABSENT)
    scale = shown.scale if shown else 1.0
    decimals = 1 if shown and shown.unit else 3 if shown else 2
    text = off_zero(interval.estimate * scale, decimals, sign=True)
    if not interval.known:
        return Cell(text, remark="no interval", value=interval.estimate)
    low, high = (off_zero(v * scale, decimals, sign=True) for v in (interval.low, interval.high))
    return Cell(text, remark=f"{low} to {high}", value=interval.estimate * scale)


def p_cell(p: float) -> Cell:
    """A p value with two significant digits."""
    return Cell(ABSENT if math.isnan(p) else "< 0.001" if p < 0.001 else significant(p, 2), value=p)


def aggregates_table(results: Results) -> Table | None:
    """Methods over all conditions: mean, interquartile mean, probability of improvement over the baseline."""
    shown, base = shared_metric(results), results.baseline
    if (
        len(results.conditions) < 2
        or shown is None
        or summary(results).duplicated(["condition", "method"]).any()
    ):
        return None  # picking one of several configurations by its final runs would be selecting
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
    known = set(data["coefficient"])
    for (header, against, condition, method), rows in data.groupby(keys, sort=False):
        line = {"Flatness": Cell(str(header)), "Correlated with": Cell(GENERALIZATION_COLUMNS[str(against)])}
        if len(results.conditions) > 1:
            line["Condition"] = Cell(condition_words(str(condition)))
        if method:
            line["Method"] = Cell(str(method))
        by_name = {row["coefficient"]: row for row in rows.to_dict("records")}
        for name, title in _COEFFICIENTS.items():
            if name not in known:
                continue
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
