"""The table of what perturbations of A and B do to the merged weights."""

from __future__ import annotations

import pandas as pd

from flatbench.report.analysis import interference
from flatbench.report.analysis.quantities import condition_words
from flatbench.report.analysis.results import Results
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number

HEADERS = {
    "share": "Norm / ρ",
    "cosine": "Cosine with G",
    "rise": "Rise of the loss at norm ρ",
    "part": "Rise / rise along G",
}


def interference_table(results: Results) -> Table | None:
    """A row a trained method and perturbation, a part a measure and condition; None if it was not taken."""
    found, parts = [], []
    for label in interference.labels(results):
        data = interference.over_runs(results, label)
        if data.empty:
            continue
        found.append(data.assign(measure=label))
        for condition, rows in data.groupby("condition", sort=False):
            words = condition_words(str(condition))
            caption = ", ".join(filter(None, (label, interference.radius(results, label))))
            caption += f": {words}" if words else ""
            parts.append(Part(caption, _shown(results, rows), condition=words))
    if not found:
        return None
    return Table("interference", "Perturbations in the merged weights", pd.concat(found), parts)


def _shown(results: Results, rows: pd.DataFrame) -> pd.DataFrame:
    order = {name: i for i, name in enumerate(results.methods)}
    rows = rows.sort_values("method", key=lambda names: names.map(order), kind="stable")
    columns = {
        "Trained by": [Cell(name) for name in rows["method"]],
        "Perturbation": [Cell(interference.PERTURBATIONS[name]) for name in rows["perturbation"]],
    }
    for kind, header in HEADERS.items():
        columns[header] = [
            Cell(ABSENT)
            if n == 0
            else Cell(*number(mean, std), remark="one run" if n == 1 else "", value=float(mean))
            for mean, std, n in zip(rows[f"{kind}_mean"], rows[f"{kind}_std"], rows[f"{kind}_n"], strict=True)
        ]
    return pd.DataFrame(columns)
