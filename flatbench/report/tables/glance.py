"""Every method on one line: how well it generalizes, how flat it is, and what a step of it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from flatbench.report.analysis.differences import ALL, shared_metric
from flatbench.report.analysis.quantities import Metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import summary
from flatbench.report.numbers import fixed, significant
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number
from flatbench.report.text.sentences import size, with_interval
from flatbench.report.text.statement import Statement
from flatbench.report.text.statements import statements


def methods_table(results: Results) -> Table | None:
    """A row a method: test metric and primary flatness with their main differences to the reference, and
    cost.

    None where the conditions' metrics are on different scales, or where there is one method: a mean over
    tasks would mean nothing then.
    """
    shown = shared_metric(results)
    if shown is None or len(results.methods) < 2 or not results.final["test"].notna().any():
        return None
    made = statements(results)
    levels = _test_levels(results, made)
    main = [s for s in made if s.kind == "difference" and s.role == "main"]
    if {s.condition for s in main} - {"", ALL} or not levels:
        return None
    several = len(results.conditions) > 1
    over = ", mean over all conditions" if several else ""
    data = pd.DataFrame({"method": results.methods})
    data["test"] = [levels.get(m) for m in results.methods]
    columns = {
        "Method": [Cell(m) for m in results.methods],
        shown.header("Test") + over: [_level(levels.get(m), shown) for m in results.methods],
    }
    flat = next((s for s in made if s.kind == "flattest"), None)
    for column, level in (("test", None), (flat.details["column"] if flat else "", flat)):
        own = {s.subject: s for s in main if s.details["column"] == column}
        if level is not None:
            means = level.details["means"]
            kind = "geometric mean" if level.scale == "ratio" else "mean"
            data[column] = [means.get(m) for m in results.methods]
            columns[f"{level.quantity}, {kind}"] = [_mean(means.get(m)) for m in results.methods]
        if own:
            _compare(results, own, data, columns)
    _add_cost(results, made, data, columns)
    return Table("methods", "Methods at a glance", data, [Part(results.name, pd.DataFrame(columns))])


def _test_levels(results: Results, made: Sequence[Statement]) -> dict[str, float]:
    """Each method's test metric, a mean over all conditions; only of methods that have every one."""
    by_condition = [s.details["means"] for s in made if s.kind == "highest"]
    if len(by_condition) < len(results.conditions):
        return {}
    whole = [m for m in results.methods if all(m in means for means in by_condition)]
    return {m: sum(means[m] for means in by_condition) / len(by_condition) for m in whole}


def _compare(
    results: Results, own: Mapping[str, Statement], data: pd.DataFrame, columns: dict[str, list[Cell]]
) -> None:
    """The differences in one quantity, and what of them is claimed."""
    first = next(iter(own.values()))
    base, unit = first.details["reference"], first.details["unit"]
    name = f"over {base}'s" if first.scale == "ratio" else f"minus {base}'s"
    units = f" ({unit})" if unit and first.scale != "ratio" else ""
    short = (
        "Eigenvalue" if first.details["column"].endswith("eigenvalue_1") else first.quantity.split(" (")[0]
    )
    for end in ("estimate", "low", "high"):
        data[f"{first.details['column']}_difference_{end}"] = [
            getattr(own[m], end) if m in own else None for m in results.methods
        ]
    columns[f"{short} {name}{units}, 95 % interval"] = [
        _difference(own.get(m), base, m) for m in results.methods
    ]


def _difference(found: Statement | None, base: str, method: str) -> Cell:
    if found is None:
        return Cell("reference" if method == base else ABSENT)
    if found.estimate is None:
        return Cell(ABSENT)
    text, _, interval = with_interval(found).partition(" [")
    shown = f"{text} [{interval}" if interval else size(found, found.estimate)
    return Cell(shown, remark=found.details["verdict"], value=found.estimate)


def _level(value: float | None, shown: Metric) -> Cell:
    if value is None:
        return Cell(ABSENT)
    return Cell(fixed(value * shown.scale, 1 if shown.scale == 100 else 3), value=value * shown.scale)


def _mean(value: float | None) -> Cell:
    return Cell(ABSENT) if value is None else Cell(number(value)[0], value=value)


def _add_cost(
    results: Results, made: Sequence[Statement], data: pd.DataFrame, columns: dict[str, list[Cell]]
) -> None:
    cost = next((s for s in made if s.kind == "cost"), None)
    if cost is not None:
        means = cost.details["means"]
        data["cost"] = [means.get(m) for m in results.methods]
        digits = 3 if cost.details["timed"] else 4
        columns[cost.quantity] = [
            Cell(ABSENT) if m not in means else Cell(significant(means[m], digits), value=means[m])
            for m in results.methods
        ]
    rows = summary(results).groupby("method", sort=False)[["runs", "expected"]].sum()
    data["runs"] = [int(rows["runs"].get(m, 0)) for m in results.methods]
    expected = [int(rows["expected"].get(m, 0)) for m in results.methods]
    columns["Final runs"] = [
        Cell(str(n) if n == of else f"{n} of {of}", value=float(n))
        for n, of in zip(data["runs"], expected, strict=True)
    ]
