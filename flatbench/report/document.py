"""The report as files: tables, figures, and a README that says in words what was found and how."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flatbench.report import figures, listings, render, style
from flatbench.report.cells import markdown, number, one_line
from flatbench.report.quantities import lower_first, main_flatness, metric
from flatbench.report.remarks import notes
from flatbench.report.results import Results
from flatbench.report.summary import summary
from flatbench.report.tables import Table, cost_table, flatness_table, overview_table, results_table
from flatbench.store import write_text


@dataclass
class Report:
    """What was written.

    Attributes:
        files: names of the files in the report's folder.
        notes: what a reader has to know before believing the numbers.
    """

    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Picture:
    file: str
    caption: str
    alt: str


def write_report(results: Results, folder: Path) -> Report:
    """Write the report of a study into a folder: the same results give the same bytes.

    Raises InputError if the folder cannot be written.
    """
    report = Report(notes=notes(results))
    tables = all_tables(results)
    for table in tables:
        _write_table(table, folder, report)
    pictures = []
    with style.styled():
        for figure in figures.all_figures(results):
            files = style.save(figure.figure, folder / "figures", figure.name)
            report.files += [f"figures/{name}" for name in files]
            pictures.append(_Picture(f"figures/{figure.name}.png", figure.caption, figure.alt))
    study = yaml.safe_dump(dict(results.content["study"]), sort_keys=False, allow_unicode=True, width=100)
    _write(folder, "study.yaml", study, report)
    _write(folder, "README.md", _readme(results, tables, pictures, report.notes), report)
    return report


def all_tables(results: Results) -> list[Table]:
    """Every table that the results allow, the main one first."""
    made = [
        results_table(results),
        overview_table(results),
        flatness_table(results),
        cost_table(results),
        listings.measures_table(results),
        listings.selection_table(results),
        listings.runs_table(results),
    ]
    return [table for table in made if table is not None]


def _write(folder: Path, name: str, text: str, report: Report) -> None:
    write_text(folder / name, text)
    report.files.append(name)


def _write_table(table: Table, folder: Path, report: Report) -> None:
    _write(folder, f"{table.name}.csv", render.to_csv(table), report)
    if table.parts:
        title = f"# {markdown(table.title)}\n\n"
        _write(folder, f"{table.name}.md", title + render.to_markdown(table), report)
        _write(folder, f"{table.name}.tex", render.to_latex(table), report)


def _readme(
    results: Results, tables: Sequence[Table], pictures: Sequence[_Picture], remarks: Sequence[str]
) -> str:
    by_name = {table.name: table for table in tables}
    lines = [f"# {markdown(results.name)}", ""]
    description = " ".join(str(results.content["study"].get("description") or "").split())
    if description:
        lines += [markdown(description), ""]
    lines += ["## What was found", "", *(f"- {markdown(line)}" for line in findings(results)), ""]
    if remarks:
        lines += ["## Read this first", "", *(f"- {markdown(note)}" for note in remarks), ""]
    for name in ("overview", "results", "flatness", "cost"):
        if name in by_name:
            lines += [f"## {by_name[name].title}", "", render.to_markdown(by_name[name], level=3)]
            lines += [*_explanations(results)] if name == "results" else []
    if pictures:
        lines += ["## Figures", ""]
        for picture in pictures:
            lines += [f"![{markdown(picture.alt)}]({picture.file})", "", markdown(picture.caption), ""]
    if "selection" in by_name:
        lines += ["## Selection on validation data", "", render.to_markdown(by_name["selection"], level=3)]
    lines += _making(results)
    lines += ["## Files", "", *_file_list(tables), ""]
    return "\n".join(lines)


def findings(results: Results) -> list[str]:
    """What the numbers say, condition by condition: the means with their spread, and no more than that."""
    found = []
    for condition, rows in summary(results).groupby("condition", sort=False):
        prefix = f"{condition!s}: " if condition else ""
        found += [prefix + text for text in _condition_findings(results, rows)]
    return found


def _condition_findings(results: Results, rows: Any) -> Iterator[str]:
    usable = rows.dropna(subset=["test_mean"])
    if usable.empty:
        yield "No final run has a test metric yet."
        return
    if usable["method"].duplicated().any():
        yield f"{len(usable)} configurations were trained with the final seeds, none was selected."
        return
    shown = metric(str(usable["metric"].iloc[0]))
    ordered = usable.sort_values("test_mean", ascending=False, kind="stable")
    texts = [_mean_text(row, shown) for row in ordered.to_dict("records")]
    yield f"{shown.header('Test')}, highest mean first: {', '.join(texts)}."
    yield from _flattest(results, usable)


def _mean_text(row: Mapping[str, Any], shown: Any) -> str:
    mean, std = row["test_mean"] * shown.scale, row["test_std"] * shown.scale
    decimals = 1 if shown.unit else 3
    spread = f" ± {std:.{decimals}f}" if std == std else ""
    count = int(row["test_n"])
    return f"{row['method']} {mean:.{decimals}f}{spread} ({count} seed{'s' if count != 1 else ''})"


def _flattest(results: Results, rows: Any) -> Iterator[str]:
    parts = []
    for quantity in main_flatness(results):
        column = f"{quantity.column}_mean"
        known = rows.dropna(subset=[column])
        if len(known) > 1:
            low, high = known.loc[known[column].idxmin()], known.loc[known[column].idxmax()]
            parts.append(
                f"{lower_first(quantity.header)} from {number(low[column])[0]} ({low['method']}) to "
                f"{number(high[column])[0]} ({high['method']})"
            )
    if parts:
        yield f"Means of {' and of '.join(parts)}."


def _explanations(results: Results) -> list[str]:
    data = summary(results)
    ranked = not data.duplicated(["condition", "method"]).any()
    lines = ["Mean ± standard deviation (n − 1) over the final seeds."]
    if ranked:
        lines.append(
            "The best mean of a column is bold, the second in italics, among methods with every run."
        )
    else:
        lines.append(
            "Nothing is marked as best: every configuration of the grid is shown, and picking one of them by "
            "its test metric would be choosing on the test split."
        )
    if results.tuned:
        lines.append(
            "Hyper-parameters were chosen on validation data with seeds of their own; every method tried the "
            "same number of configurations, and the test split was read by final runs only."
        )
    if results.final["time_ratio"].notna().any():
        lines.append(
            f"Relative times are means of ratios to the run of {results.baseline} with the same seed."
        )
    if results.columns("eigenvalue_1"):
        lines.append(
            "Some eigenvalue of the Hessian lies within the error bound (residual / eigenvalue, the largest "
            "over runs) of the value given; that it is the largest is not proved by it."
        )
    return [" ".join(lines), ""]


def _making(results: Results) -> list[str]:
    """The commands and the machines behind the numbers."""
    lines = [
        "## How it was made",
        "",
        "`study.yaml` in this folder is the study with every override put in:",
        "",
        "```sh",
        "flatbench run study.yaml",
        f"flatbench report {shlex.quote(one_line(results.name))}",
        "```",
        "",
    ]
    for environment in results.environments:
        versions = ", ".join(f"{key} {value}" for key, value in environment["versions"].items())
        commit = environment.get("git_commit")
        text = (
            f"{len(environment['runs'])} runs on {environment['device']}, {environment['processor']}, "
            f"{environment['cores']} cores, {environment['threads']} thread(s), {environment['system']}; "
            f"{versions}" + (f"; commit {commit}" if commit else "") + "."
        )
        lines.append(f"- {markdown(one_line(text, 1000))}")
    return [*lines, ""] if results.environments else lines


def _file_list(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        endings = ["md", "csv", "tex"] if table.parts else ["csv"]
        links = ", ".join(f"[{ending}]({table.name}.{ending})" for ending in endings)
        yield f"- {table.title}: {links}"
    yield "- Figures: PNG and PDF in [figures](figures)"
    yield "- The study: [study.yaml](study.yaml)"
