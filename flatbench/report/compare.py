"""Compare two results: set-up, versions, and numbers with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group
from rich.markup import escape

from flatbench.config.words import settings
from flatbench.report.analysis.inference import judge
from flatbench.report.analysis.quantities import (
    Metric,
    Quantity,
    condition_words,
    lower_first,
    main_flatness,
    metric,
    paired_time,
    timed,
)
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import LEVEL, Interval
from flatbench.report.numbers import off_zero, rounded, significant
from flatbench.report.tables import render
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, markdown, number, one_line
from flatbench.report.tables.evidence import interval_cell, p_cell
from flatbench.report.terminal import Fitted
from flatbench.store.files import write_text


class Comparison:
    """Two results, A before and B after.

    Attributes:
        remarks: what has to be known before the numbers are believed.
        tables: what was set otherwise, and what came out otherwise.
    """

    def __init__(self, a: Results, b: Results) -> None:
        self.a, self.b = a, b
        self.numbers = _numbers(a, b)
        self.settings = pd.DataFrame([*_settings(a, b)], columns=["setting", "a", "b"])
        self.remarks = [*_remarks(a, b, self.numbers)]
        self.tables = [t for t in (_numbers_table(self.numbers), _settings_table(self.settings)) if t]

    def terminal(self) -> Group:
        """For a terminal."""
        lines: list[Any] = [f"- {escape(text)}" for text in self.remarks]
        lines += ["", f"A: {escape(_title(self.a))}", f"B: {escape(_title(self.b))}", ""]
        return Group(*lines, *(Fitted(part) for table in self.tables for part in table.parts))

    def write(self, folder: Path) -> list[str]:
        """Write README.md, and each table as CSV and LaTeX; returns the files' names.

        Raises StorageError if the folder cannot be written.
        """
        lines = ["# What changed", "", f"- A: {markdown(_title(self.a))}", f"- B: {markdown(_title(self.b))}"]
        lines += [f"- {markdown(text)}" for text in self.remarks]
        written = ["README.md"]
        for table in self.tables:
            lines += ["", f"## {table.title}", "", render.to_markdown(table)]
            for ending, text in (("csv", render.to_csv(table)), ("tex", render.to_latex(table))):
                write_text(folder / f"{table.name}.{ending}", text)
                written.append(f"{table.name}.{ending}")
        write_text(folder / "README.md", "\n".join(lines))
        return written


def _title(results: Results) -> str:
    commits = sorted({str(c)[:12] for e in results.environments if (c := e.get("git_commit"))})
    runs = f"{len(results.final)} final runs"
    return f"{results.name}, {runs}" + (f", commit {', '.join(commits)}" if commits else "")


def _remarks(a: Results, b: Results, numbers: pd.DataFrame) -> Iterator[str]:
    """What differs and by how much, then what is not in both, then whether equal runs are equal."""
    yield from _answer(numbers)
    for kind in ("conditions", "methods"):
        of_a, of_b = getattr(a, kind), getattr(b, kind)
        for name, own, other in (("A", of_a, of_b), ("B", of_b, of_a)):
            alone = [one_line(condition_words(x) or "the only condition") for x in own if x not in other]
            if alone:
                yield f"{kind.capitalize()} in {name} alone: {', '.join(alone)}."
    yield from _identity_remarks(a, b)


def _answer(numbers: pd.DataFrame) -> Iterator[str]:
    if numbers.empty:
        yield "There is nothing to compare: no method under the same condition has results in both."
        return
    changed = numbers[(numbers["low"] > 0) | (numbers["high"] < 0)]
    family = len(numbers)
    for row in changed.to_dict("records"):
        where = f" with {condition_words(row['condition'])}" if row["condition"] else ""
        more = "higher" if row["difference"] > 0 else "lower"
        yield (
            f"{row['method']}{one_line(where)}: {_bare(row)} is {more} in B, by {_change(row)} (95 % "
            f"interval, "
            f"simultaneous over {family} differences; p {p_cell(row['p']).text})."
        )
    known = numbers["low"].notna()
    if known.any() and changed.empty:
        yield (
            f"Nothing is told apart: each of the {int(known.sum())} intervals, simultaneous over {family} "
            f"differences, holds zero.{_visible(numbers)}"
        )
    if not known.all():
        yield f"{int((~known).sum())} differences have no interval (too few runs)."


def _bare(row: Mapping[Any, Any]) -> str:
    """The quantity without the unit, which stands at the number."""
    return lower_first(str(row["header"]).removesuffix(" (%)").removesuffix(" (ms)"))


def _change(row: Mapping[Any, Any]) -> str:
    """``+5.0 points [+4.9, +5.1]``."""
    header, scale = str(row["header"]), row["scale"]
    unit = " points" if header.endswith(" (%)") else " ms" if header.endswith(" (ms)") else ""
    ends = [row[key] * scale for key in ("difference", "low", "high")]
    shown = [off_zero(v, 1, sign=True) if scale != 1 else _sign_text(v) for v in ends]
    return f"{shown[0]}{unit} [{shown[1]}, {shown[2]}]"


def _sign_text(value: float) -> str:
    return f"{'+' if value > 0 else ''}{significant(value, 3)}"


def _visible(numbers: pd.DataFrame) -> str:
    """The least and the most that the differences in test metric would have had to be."""
    own = numbers[(numbers["quantity"] == "test") & numbers["smallest"].map(lambda v: 0 < v < math.inf)]
    if own.empty:
        return ""
    shown = sorted(own["smallest"] * own["scale"])
    ends = dict.fromkeys(significant(v, 2) for v in (shown[0], shown[-1]))
    points = " points" if (own["scale"] == 100).all() else ""
    return f" In the test metric {' to '.join(ends)}{points} could have been seen at 80 % power."


def _identity_remarks(a: Results, b: Results) -> Iterator[str]:
    """Runs with one identity should have one result; if not, code or machine made the difference."""
    columns = ["run", "test", "validation"]
    both = a.final[columns].drop_duplicates("run").merge(b.final[columns].drop_duplicates("run"), on="run")
    both = both.dropna(subset=["validation_x", "validation_y"])
    if both.empty:
        return
    same = (both["test_x"].fillna(-1) == both["test_y"].fillna(-1)) & (
        both["validation_x"] == both["validation_y"]
    )
    largest = float((both["test_x"] - both["test_y"]).abs().max())
    rest = "" if same.all() else f"; the largest difference in the test metric is {significant(largest, 3)}"
    yield f"{len(both)} runs are in both; {int(same.sum())} of them have equal metrics to the bit{rest}."


def _numbers(a: Results, b: Results) -> pd.DataFrame:
    """A row a condition, method and quantity that both have, in the stored unit.

    Columns: ``condition``, ``method``, ``quantity``, ``header``, ``scale``, ``a_mean``, ``a_std``, ``a_n``,
    ``a_configuration`` (and of b), ``difference`` (B − A), ``low``, ``high``, ``n``, ``interval``,
    ``smallest`` (visible at 80 % power; NaN if not paired) and ``p``. Intervals and p are simultaneous over
    all rows.
    """
    wanted = []
    for condition in (c for c in a.conditions if c in b.conditions):
        for method in (m for m in a.methods if m in b.methods):
            ours, theirs = (_runs(r, condition, method) for r in (a, b))
            if len(ours) and len(theirs):
                wanted += [
                    (ours, theirs, q) for q in _quantities(a, b, ours, theirs) if _both(ours, theirs, q)
                ]
    return pd.DataFrame([_row(*one, family=len(wanted)) for one in wanted])


def _values(runs: pd.DataFrame, quantity: Quantity) -> pd.Series[float]:
    own = runs.set_index("seed")[quantity.column]
    return pd.to_numeric(own, errors="coerce").astype(float).dropna()


def _both(ours: pd.DataFrame, theirs: pd.DataFrame, quantity: Quantity) -> bool:
    return not any(_values(runs, quantity).empty for runs in (ours, theirs))


def _runs(results: Results, condition: str, method: str) -> pd.DataFrame:
    runs = results.representatives
    return runs[(runs["condition"] == condition) & (runs["method"] == method)]


def _quantities(a: Results, b: Results, ours: pd.DataFrame, theirs: pd.DataFrame) -> Iterator[Quantity]:
    names = {*ours["metric"].dropna(), *theirs["metric"].dropna()}
    if len(names) == 1:
        shown = metric(str(names.pop()))
        yield Quantity("test", shown.header("Test"), "higher", shown.scale)
        yield Quantity("gap", f"Train − test {shown.name}", "neither", shown.scale)
    known = {q.header: q for q in main_flatness(b)}
    # the same label may stand for other options in the other study, so the whole header has to agree
    yield from (q for q in main_flatness(a) if known.get(q.header) == q)
    if timed(a) and timed(b):  # other times measure what else their machines did
        yield Quantity("step_ms", "Time per step (ms)", "lower")
    if paired_time(a) == paired_time(b) and a.column("paired_ratio"):
        yield paired_time(a)


def _row(ours: pd.DataFrame, theirs: pd.DataFrame, quantity: Quantity, family: int) -> dict[str, Any]:
    first, second = (_values(runs, quantity) for runs in (ours, theirs))
    interval, p, smallest = _difference(first, second, family)
    row = {
        "condition": ours["condition"].iloc[0],
        "method": ours["method"].iloc[0],
        "quantity": quantity.column,
        "header": quantity.header,
        "scale": quantity.scale,
        "difference": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "interval": interval.method,
        "smallest": smallest,
        "p": p,
    }
    for name, runs, own in (("a", ours, first), ("b", theirs, second)):
        row |= {f"{name}_mean": own.mean(), f"{name}_std": own.std(), f"{name}_n": len(own)}
        row[f"{name}_configuration"] = runs["configuration"].iloc[0]
    return row


def _difference(
    first: pd.Series[float], second: pd.Series[float], family: int
) -> tuple[Interval, float, float]:
    """B − A with p and what is visible: paired where both have the same seeds, which share what is random;
    else Welch's interval."""
    if set(first.index) == set(second.index):
        (found,) = judge([second - first.reindex(second.index)], family, LEVEL)
        return found.interval, found.p, found.smallest
    estimate = float(second.mean() - first.mean())
    n = min(len(first), len(second))
    if n < 2:
        return Interval(estimate, math.nan, math.nan, LEVEL, n, "no interval: one value"), math.nan, math.nan
    from scipy import stats

    made = stats.ttest_ind(second, first, equal_var=False)
    limits = made.confidence_interval(1 - (1 - LEVEL) / family)
    size = float(max(first.abs().max(), second.abs().max()))
    estimate, low, high = (rounded(v, size) for v in (estimate, float(limits.low), float(limits.high)))
    interval = Interval(estimate, low, high, LEVEL, n, f"Welch's t, simultaneous over {family}")
    return interval, min(1.0, family * float(made.pvalue)), math.nan


def _interval(row: Mapping[Any, Any]) -> Interval:
    return Interval(row["difference"], row["low"], row["high"], LEVEL, row["n"], row["interval"])


def _scale(row: Mapping[Any, Any]) -> Metric:
    return Metric("", row["scale"], "%" if row["scale"] != 1 else "")


def _numbers_table(data: pd.DataFrame) -> Table | None:
    if data.empty:
        return None
    rows = data.to_dict("records")
    shown: dict[str, list[Cell]] = {}
    if data["condition"].any():
        shown["Condition"] = [Cell(condition_words(str(text))) for text in data["condition"]]
    shown |= {
        "Method": [Cell(str(text)) for text in data["method"]],
        "Quantity": [Cell(str(text)) for text in data["header"]],
        "A": [_side(row, "a") for row in rows],
        "B": [_side(row, "b") for row in rows],
        "B − A, 95 % interval": [interval_cell(_interval(row), _scale(row)) for row in rows],
        "Interval": [Cell(_kind(str(text))) for text in data["interval"]],
        "p": [p_cell(p) for p in data["p"]],
        "Visible at 80 % power": [
            Cell(ABSENT) if pd.isna(row["smallest"]) else Cell(significant(row["smallest"] * row["scale"], 2))
            for row in rows
        ],
    }
    chosen = data["a_configuration"] != data["b_configuration"]
    if chosen.any():
        shown["Hyper-parameters of A and B"] = [
            Cell(f"{row['a_configuration']}; {row['b_configuration']}" if differs else "the same")
            for row, differs in zip(rows, chosen, strict=True)
        ]
    return Table("numbers", "Numbers", data, [Part("A and B", pd.DataFrame(shown))])


def _kind(method: str) -> str:
    return method.replace("paired t", "paired by seed")


def _side(row: Mapping[Any, Any], side: str) -> Cell:
    mean, std = row[f"{side}_mean"] * row["scale"], row[f"{side}_std"] * row["scale"]
    text, spread = number(mean, std, 1 if row["scale"] != 1 else None)
    return Cell(text, spread, "one run" if row[f"{side}_n"] == 1 else "", value=mean)


def _settings(a: Results, b: Results) -> Iterator[tuple[str, str, str]]:
    """What the studies, the versions and the machines do not have in common."""
    pairs = [(dict(settings(r.content["study"])) | _machines(r.environments)) for r in (a, b)]
    for key in dict.fromkeys([*pairs[0], *pairs[1]]):
        if pairs[0].get(key) != pairs[1].get(key):
            yield key, pairs[0].get(key, ABSENT), pairs[1].get(key, ABSENT)


def _machines(environments: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Values by name, all that occur, for what describes where runs were trained."""
    found: dict[str, list[str]] = {}
    for environment in environments:
        versions = {f"version of {key}": value for key, value in environment.get("versions", {}).items()}
        own = {
            k: environment.get(k) for k in ("git_commit", "processor", "device", "cores", "threads", "jobs")
        }
        for key, value in {**versions, **own}.items():
            found.setdefault(key, []).append(str(value))
    return {key: ", ".join(sorted(set(values))) for key, values in found.items()}


def _settings_table(data: pd.DataFrame) -> Table | None:
    if data.empty:
        return None
    shown = {"Setting": "setting", "A": "a", "B": "b"}
    cells = pd.DataFrame({name: [Cell(one_line(v)) for v in data[key]] for name, key in shown.items()})
    return Table("settings", "Settings and versions", data, [Part("Settings that differ", cells)])
