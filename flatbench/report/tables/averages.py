"""The tables of averages: what is shown, cell by cell, and the plain numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from flatbench.report.analysis.differences import method_values, on_log_scale
from flatbench.report.analysis.quantities import (
    Quantity,
    condition_words,
    flatness,
    lower_first,
    main_cost,
    main_flatness,
    metric,
    own_time,
    paired_time,
    timed,
)
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import KEYS, summary
from flatbench.report.numbers import rounded
from flatbench.report.resolution import below as below_resolution
from flatbench.report.tables.cells import ABSENT, Cell, number


@dataclass(frozen=True)
class Part:
    """What is shown under one heading.

    Attributes:
        shown: a frame of `Cell` with the headers in its column names.
        runs: for every row the ids of the runs behind it; empty where rows have none of their own.
        condition: the condition that it is of, in words; "" if it is of none, or of the only one.
    """

    caption: str
    shown: pd.DataFrame
    runs: Sequence[Sequence[str]] = ()
    condition: str = ""


#: more rows are for programs, and are in the table's CSV alone
MOST_ROWS = 1000


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        name: stem of its files.
        title: its heading.
        data: the numbers, tidy.
        parts: what is shown; one part a condition, or one in all; none if that is too long to be read.
        unshown: rows of a table that is too long.
    """

    name: str
    title: str
    data: pd.DataFrame
    parts: Sequence[Part]
    unshown: int = 0

    @property
    def rows(self) -> int:
        """How many rows there are to be read."""
        return self.unshown or sum(len(part.shown) for part in self.parts)

    @property
    def readable(self) -> bool:
        """Whether anybody reads it line by line."""
        return 0 < self.rows <= MOST_ROWS


def results_table(results: Results) -> Table:
    """Per condition, method and configuration: what was chosen, metric, gap, flatness, time."""
    data = summary(results)
    parts = []
    for condition, rows in data.groupby("condition", sort=False):
        shown = metric(str(rows["metric"].iloc[0]))
        columns = {
            "Method": [Cell(name) for name in rows["method"]],
            "Hyper-parameters": [Cell(text or ABSENT) for text in rows["configuration"]],
            "Configurations tried": _trial_cells(results, rows),
            "Final runs": _runs(rows),
        }
        fixed = 1 if shown.unit else None
        quantities = [
            Quantity("test", shown.header("Test"), "higher", shown.scale, fixed),
            Quantity("validation", shown.header("Validation"), "neither", shown.scale, fixed),
            Quantity("gap", _gap_header(shown), "neither", shown.scale, fixed),
            *main_flatness(results),
            main_cost(results),
        ]
        for quantity in quantities:
            if _has_values(data, quantity):
                cells = spread_cells(results, rows, quantity)
                if quantity.column.endswith("gradients_per_step"):
                    cells = [_drop_zero_spread(cell) for cell in cells]
                columns[quantity.header] = _with_bounds(cells, quantity, rows)
        parts.append(_of_condition(results, str(condition), columns, rows))
    return Table("results", "Results", data, parts)


def _gap_header(shown: Any) -> str:
    unit = f" ({shown.difference})" if shown.difference else ""
    return f"Generalization gap: train − test {shown.name}{unit}"


def _of_condition(
    results: Results, condition: str, columns: dict[str, list[Cell]], rows: pd.DataFrame
) -> Part:
    words = condition_words(condition)
    caption = f"{results.name}: {words}" if words else results.name
    return Part(caption, pd.DataFrame(columns), [text.split() for text in rows["run_ids"]], words)


def _has_values(data: pd.DataFrame, quantity: Quantity) -> bool:
    return f"{quantity.column}_n" in data and bool(data[f"{quantity.column}_n"].sum())


def _trial_cells(results: Results, rows: pd.DataFrame) -> list[Cell]:
    if not results.tuned:
        return [Cell("not tuned") for _ in range(len(rows))]
    return [
        Cell(
            f"{r['tried']} × {r['tuning_seeds']} tuning seed" + ("s" if r["tuning_seeds"] != 1 else ""),
            remark=f"at the edge: {r['edges']}" if r["edges"] else "",
            value=float(r["tried"]),
        )
        for r in rows.to_dict("records")
    ]


def _runs(rows: pd.DataFrame) -> list[Cell]:
    cells = []
    for row in rows.to_dict("records"):
        lost = [f"{row[s]} {s}" for s in ("diverged", "failed", "unfinished", "undefined") if row[s]]
        whole = row["runs"] == row["expected"]
        text = str(row["runs"]) if whole else f"{row['runs']} of {row['expected']}"
        cells.append(Cell(text, remark=", ".join(lost), value=float(row["runs"])))
    return cells


def spread_cells(results: Results, rows: pd.DataFrame, quantity: Quantity) -> list[Cell]:
    """Mean ± standard deviation over runs; the best and second of the complete rows are marked.

    Nothing is marked where a method has several final configurations: marking the best of many on the test
    split would be choosing on it.
    """
    column = quantity.column
    means = rows[f"{column}_mean"]
    below = rows[f"{column}_below_n"].fillna(0) if f"{column}_below_n" in rows else means.isna() & False
    complete = (rows[f"{column}_n"] == rows["expected"]) & means.notna() & (below == 0)
    single = not rows["method"].duplicated().any()
    ranks = [0] * len(rows)
    if single:
        compared = _as_compared(results, rows, quantity) if on_log_scale(results, quantity) else means
        ranks = _ranks(compared.where(complete), quantity)
    cells = []
    for row, rank, hidden in zip(rows.to_dict("records"), ranks, below, strict=True):
        n = int(row[f"{column}_n"])
        if n == 0:
            cells.append(Cell(ABSENT))
            continue
        mean, std = row[f"{column}_mean"] * quantity.scale, row[f"{column}_std"] * quantity.scale
        text, spread = number(mean, std, quantity.decimals)
        remark = "one run" if n == 1 else f"n = {n}" if n < row["expected"] else ""
        if hidden == n:  # rounding may be all that there is
            cells.append(Cell(below_resolution(mean, row[f"{column}_rounding_error_max"]), remark=remark))
            continue
        if hidden:
            remark = ", ".join(filter(None, (remark, f"{int(hidden)} of {n} below resolution")))
        if column.endswith("time_ratio") and row["method"] == results.baseline and mean == 1:
            spread = ""  # one by definition
        cells.append(Cell(text, spread, remark, rank, mean))
    return cells


def _as_compared(results: Results, rows: pd.DataFrame, quantity: Quantity) -> pd.Series[float]:
    """Each row's mean of what comparisons are made of: of logarithms, where these compare ratios."""
    values = method_values(results, quantity).groupby(level=["condition", "method"]).mean()
    keys = pd.MultiIndex.from_frame(rows[["condition", "method"]])
    return pd.Series(values.reindex(keys).to_numpy(), index=rows.index)


def _ranks(means: pd.Series[float], quantity: Quantity) -> list[int]:
    if quantity.better == "neither" or means.notna().sum() < 2:
        return [0] * len(means)
    places = means.map(rounded).rank(method="min", ascending=quantity.better == "lower")
    return [int(place) if place <= 2 else 0 for place in places.fillna(9)]


def _errors(quantity: Quantity, row: Mapping[Any, Any]) -> tuple[str, float] | None:
    """The larger error of a row's values, relative to them, and what it comes from; None if none is known."""
    numerical = row.get(f"{quantity.label}.relative_error_bound_1_max", math.nan)
    of = ""
    if not quantity.column.endswith(".eigenvalue_1"):
        numerical, of = row.get(f"{quantity.column}_rounding_share_max", math.nan), " by rounding"
    sampling = row.get(f"{quantity.column}_sampling_error_max", math.nan)
    if (pd.isna(sampling) or sampling == 0) and pd.isna(numerical):
        return None
    if not pd.isna(sampling) and not sampling <= numerical:
        text = f"± {number(100 * sampling)[0]} %" if math.isfinite(sampling) else "unknown"
        return f"{text} by sampling", sampling
    text = f"≤ {number(100 * numerical)[0]} %" if math.isfinite(numerical) else "unknown"
    return f"{text}{of}", numerical


def _with_bounds(cells: list[Cell], quantity: Quantity, rows: pd.DataFrame) -> list[Cell]:
    """Values carry the larger of their errors."""
    found = [_errors(quantity, row) for row in rows.to_dict("records")]
    texts = [f"error {error[0]}" if error else "" for error in found]
    return [
        replace(cell, remark=", ".join(filter(None, (cell.remark, text)))) if cell.value is not None else cell
        for cell, text in zip(cells, texts, strict=True)
    ]


def _bounds(quantity: Quantity, rows: pd.DataFrame) -> list[Cell]:
    """The largest error of a row's values, and how many of them missed what was asked of them."""
    label, cells = quantity.label, []
    for row in rows.to_dict("records"):
        error, n = _errors(quantity, row), int(row[f"{quantity.column}_n"])
        if n == 0 or error is None:
            cells.append(Cell(ABSENT))
            continue
        remarks = []
        if loose := n - row.get(f"{label}.converged_n", n):
            remarks.append(f"{loose} of {n} not converged")
        if unresolved := row.get(f"{label}.resolved_not_n", 0):
            remarks.append(f"{unresolved} of {n} not resolved: more examples")
        cells.append(Cell(error[0], remark=", ".join(remarks), value=error[1]))
    return cells


def flatness_table(results: Results) -> Table | None:
    """Every sharpness in every space, eigenvalues with their error bounds."""
    data = summary(results)
    quantities = [q for q in flatness(results) if _has_values(data, q)]
    if not quantities:
        return None
    parts = []
    for condition, rows in data.groupby("condition", sort=False):
        columns = _names(rows)
        for quantity in quantities:
            columns[quantity.header] = spread_cells(results, rows, quantity)
            known = {f"{quantity.column}_sampling_error_max", f"{quantity.column}_rounding_error_max"}
            if quantity.column.endswith(".eigenvalue_1") or known & set(rows):
                columns[f"Error bound of {lower_first(quantity.header)}"] = _bounds(quantity, rows)
        parts.append(_of_condition(results, str(condition), columns, rows))
    prefixes = tuple(f"{q.label}." for q in quantities)
    own = [c for c in data.columns if str(c).startswith(prefixes)]
    return Table("flatness", "Flatness", data[[*KEYS, *own]], parts)


def _names(rows: pd.DataFrame) -> dict[str, list[Cell]]:
    """The columns that say what a row is; hyper-parameters only where the method alone does not."""
    columns = {"Method": [Cell(name) for name in rows["method"]]}
    if rows["method"].duplicated().any():
        columns["Hyper-parameters"] = [Cell(text or ABSENT) for text in rows["configuration"]]
    return columns


def overview_table(results: Results) -> Table | None:
    """Methods down, conditions across; None with one condition or several final configurations."""
    data = summary(results)
    if len(results.conditions) < 2 or data.duplicated(["condition", "method"]).any():
        return None
    columns = {"Method": [Cell(name) for name in results.methods]}
    for condition, rows in data.groupby("condition", sort=False):
        shown = metric(str(rows["metric"].iloc[0]))
        header = f"{condition_words(str(condition))}: {lower_first(shown.header('Test'))}"
        quantity = Quantity("test", header, "higher", shown.scale, 1 if shown.unit else None)
        columns[header] = spread_cells(results, rows, quantity)
    keys = ["condition", "method", "metric", "test_mean", "test_std", "test_n", "expected"]
    return Table("overview", "All conditions", data[keys], [Part(results.name, pd.DataFrame(columns))])


def cost_table(results: Results) -> Table | None:
    """What training cost per condition and method."""
    data = summary(results)
    base = results.baseline
    times = [
        Quantity("step_ms", "Time per step (ms)", "lower"),
        own_time(results),
        paired_time(results),
        Quantity(results.column("train_seconds") or "-", "Training time (s)", "lower"),
        Quantity("total_time_ratio", f"Training time relative to {base}", "lower", 1.0, 2),
        _energy(results),
    ]
    quantities = [
        Quantity(results.column("gradients_per_step") or "-", "Gradients per step", "neither", 1.0, 0),
        Quantity(
            results.column("gflops_per_example") or "-",
            "Matrix products per step and example (GFLOP)",
            "lower",
        ),
        _peak_memory(results),
        Quantity(results.column("trainable_parameters") or "-", "Trainable parameters", "neither", 1.0, 0),
    ]
    times, quantities = ([q for q in some if _has_values(data, q)] for some in (times, quantities))
    if not times and not quantities:
        return None
    parts = []
    for condition, rows in data.groupby("condition", sort=False):
        columns = _names(rows)
        for quantity in [*(times if timed(results) else ()), *quantities]:
            cells = spread_cells(results, rows, quantity)
            columns[quantity.header] = [_drop_zero_spread(cell) for cell in cells]
        parts.append(_of_condition(results, str(condition), columns, rows))
    averaged = [f"{q.column}{end}" for q in [*times, *quantities] for end in ("_mean", "_std", "_n")]
    return Table("cost", "Cost", data[[*KEYS, *averaged]], parts)


def _peak_memory(results: Results) -> Quantity:
    """On the CPU it is that of the whole process, libraries and earlier runs included: no ranking."""
    column = results.column("peak_memory_mb") or "-"
    source = results.constant(column.partition(".")[0], "peak_memory_source")
    if source == "cuda allocator":
        return Quantity(column, "Peak memory on the device (MB)", "lower", 1.0, 0)
    return Quantity(column, "Peak resident memory of the process (MB)", "neither", 1.0, 0)


def _energy(results: Results) -> Quantity:
    """A processor's counters are those of everything that ran on the machine: no ranking."""
    column = results.column("energy_joules") or "-"
    source = str(results.constant(column.partition(".")[0], "energy_source"))
    return Quantity(column, "Energy of the training (J)", "lower" if source.startswith("nvml") else "neither")


def _drop_zero_spread(cell: Cell) -> Cell:
    """Counts that all runs share need no ± 0."""
    return replace(cell, spread="") if cell.spread and float(cell.spread) == 0 else cell
