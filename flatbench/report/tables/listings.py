"""The tables that list what was done: every trial, every run, every measured number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from flatbench.config.hyper_parameters import hyper_text
from flatbench.report.analysis.quantities import condition_words, metric
from flatbench.report.analysis.results import Results, configurations
from flatbench.report.analysis.summary import KEYS, averages, edges, summary
from flatbench.report.tables.averages import MOST_ROWS, Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number, one_line
from flatbench.report.text.glossary import MEASURES
from flatbench.store.content import tied


def measures_table(results: Results) -> Table | None:
    """Every number that any measure found, averaged: a row a condition, method and quantity."""
    final = results.final
    known = set(results.content.get("measures", {}))
    known |= {c.partition(".")[0] for v in ("space", "seconds", "step_ms") for c in results.columns(v)}
    columns = [c for c in map(str, final.columns) if c.partition(".")[0] in known and "." in c]
    numeric = [c for c in columns if pd.to_numeric(final[c], errors="coerce").notna().any()]
    if not numeric:
        return None
    statistics = ["mean", "std", "min", "max", "count"]
    stacked: Any = averages(final, numeric, statistics).stack(level=0, future_stack=True)
    data = stacked.reindex(columns=statistics).reset_index()
    data = data.rename(columns={"min": "minimum", "max": "maximum", "count": "n"})
    column = data.pop(data.columns[len(KEYS)]).str.partition(".")
    data.insert(len(KEYS), "measure", column[0])
    data.insert(len(KEYS) + 1, "quantity", column[2])
    others = _others(results, data)
    if len(others) > MOST_ROWS:
        return Table("measures", "Everything measured", data, [], len(others))
    return Table("measures", "Everything measured", data, _other_measures(results, others))


def _others(results: Results, data: pd.DataFrame) -> pd.DataFrame:
    """The rows of measures that no other table knows, such as a plug-in's."""
    taken = results.content.get("measures", {})
    others = {label for label, config in taken.items() if config.get("name", label) not in MEASURES}
    return data[data["measure"].isin(others)]


def _other_measures(results: Results, own: pd.DataFrame) -> list[Part]:
    """Mean ± standard deviation."""
    if own.empty:
        return []
    columns = {
        "Method": [Cell(text) for text in own["method"]],
        **_condition_column(results, own["condition"]),
        "Hyper-parameters": [Cell(text) for text in own["configuration"]],
        "Measure": [Cell(text) for text in own["measure"]],
        "Value": [Cell(text) for text in own["quantity"]],
        "Mean": [Cell(*number(m, s), value=m) for m, s in zip(own["mean"], own["std"], strict=True)],
        "Runs": [Cell(str(n), value=float(n)) for n in own["n"]],
    }
    return [Part(results.name, pd.DataFrame(columns))]


def _condition_column(results: Results, labels: Iterable[str]) -> dict[str, list[Cell]]:
    """The conditions in words, where there are several."""
    if len(results.conditions) < 2:
        return {}
    return {"Condition": [Cell(condition_words(label)) for label in labels]}


def selection_table(results: Results) -> Table | None:
    """Every trial with its validation score, and which was chosen."""
    if not results.selection:
        return None
    rows = []
    for entry in results.selection:
        trials = [
            e["choice"]
            for e in results.selection
            if (e["condition"], e["method"]) == (entry["condition"], entry["method"])
        ]
        rows.append(
            {
                "condition": entry["condition"],
                "method": entry["method"],
                "configuration": hyper_text(entry["choice"]),
                "validation_score": entry["score"],
                "chosen": entry["chosen"],
                "edges": "; ".join(edges(entry["choice"], trials)) if entry["chosen"] else "",
                "tied": tied(entry, results.selection) if entry["chosen"] else 0,
                "failed": entry["failed"],
                "outstanding": entry["outstanding"],
            }
        )
    data = pd.DataFrame(rows)
    wanted = results.content["study"]["tune"].get("metric")
    shown = metric(wanted or str(summary(results)["metric"].iloc[0]))
    several = summary(results)["metric"].nunique() > 1 and not wanted
    header = "Validation score" if several else shown.header("Validation")
    scale = 1.0 if several else shown.scale
    columns = _condition_column(results, [r["condition"] for r in rows]) | {
        "Method": [Cell(r["method"]) for r in rows],
        "Hyper-parameters": [Cell(r["configuration"], rank=int(r["chosen"])) for r in rows],
        header: [_score(r, scale) for r in rows],
        "Chosen": [_choice(r) for r in rows],
    }
    return Table(
        "selection",
        "Selection on validation data",
        data,
        [Part(results.name, pd.DataFrame(columns), [entry["runs"] for entry in results.selection])],
    )


def _score(row: dict[str, Any], scale: float) -> Cell:
    if row["validation_score"] is not None:
        value = row["validation_score"] * scale
        return Cell(
            number(value, decimals=2 if scale != 1 else None)[0], rank=int(row["chosen"]), value=value
        )
    failed, outstanding = row["failed"], row["outstanding"]
    reasons = [f"{failed} failed"] * bool(failed) + [f"{outstanding} outstanding"] * bool(outstanding)
    return Cell(ABSENT, remark=", ".join(reasons))


def _choice(row: dict[str, Any]) -> Cell:
    if not row["chosen"]:
        return Cell("")
    remarks = [f"first of {row['tied']} that tied"] * (row["tied"] > 1)
    remarks += [f"edge of the grid: {row['edges']}"] * bool(row["edges"])
    return Cell("chosen", remark="; ".join(remarks))


def runs_table(results: Results) -> Table:
    """Every run with its state, its metrics and its error."""
    table = results.table
    data = pd.DataFrame(
        {
            "run": table["run"],
            "stage": table["stage"],
            "condition": table["condition"],
            "method": table["method"],
            "seed": table["seed"],
            "configuration": configurations(table),
            "state": table["state"],
            "metric": table["metric"],
            "error": table["error"],
        }
    )
    for split in ("validation", "test"):
        data[split] = _own_metric(table, split)
    if len(data) > MOST_ROWS:
        return Table("runs", "Runs", data, [], len(data))
    columns = {
        "Run": [Cell(text) for text in data["run"]],
        "Stage": [Cell(text) for text in data["stage"]],
        **_condition_column(results, data["condition"]),
        "Method": [Cell(text) for text in data["method"]],
        "Seed": [Cell(str(seed), value=float(seed)) for seed in data["seed"]],
        "Hyper-parameters": [Cell(text) for text in data["configuration"]],
        "State": [Cell(text) for text in data["state"]],
        "Validation metric": _metric_cells(data, "validation"),
        "Test metric": _metric_cells(data, "test"),
        "Error": [Cell(one_line(text) if isinstance(text, str) else "") for text in data["error"]],
    }
    return Table("runs", "Runs", data, [Part(results.name, pd.DataFrame(columns))])


def _own_metric(table: pd.DataFrame, split: str) -> pd.Series[float]:
    found = pd.Series(float("nan"), index=table.index, dtype=float)
    for name in table["metric"].unique():
        if f"{split}.{name}" in table:
            rows = table["metric"] == name
            found[rows] = pd.to_numeric(table.loc[rows, f"{split}.{name}"], errors="coerce").astype(float)
    return found


def _metric_cells(data: pd.DataFrame, split: str) -> list[Cell]:
    cells = []
    for name, value in zip(data["metric"], data[split], strict=True):
        shown = metric(str(name))
        text = number(value * shown.scale, decimals=2 if shown.unit else None)[0] if value == value else ""
        cells.append(Cell(text, value=value * shown.scale if text else None))
    return cells
