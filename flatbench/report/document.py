"""The report as files: tables, figures, and a README that says in words what was found and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from flatbench.machine.beside import beside
from flatbench.report import page
from flatbench.report.analysis import archive
from flatbench.report.analysis.results import Results
from flatbench.report.figures import all as figures
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure
from flatbench.report.tables import evidence, glance, interference, listings, published, render
from flatbench.report.tables.averages import Table, cost_table, flatness_table, overview_table, results_table
from flatbench.report.tables.cells import markdown
from flatbench.report.tables.published import Publication
from flatbench.report.text import answer, provenance
from flatbench.report.text.explanations import explanations
from flatbench.report.text.findings import QUESTIONS, by_question, findings, findings_json
from flatbench.report.text.remarks import notes
from flatbench.report.text.sentences import sentence
from flatbench.store.files import write_text


@dataclass
class Report:
    """What was written.

    Attributes:
        files: names of the files in the report's folder.
        notes: what a reader has to know before believing the numbers.
    """

    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_report(
    results: Results, folder: str | Path, html: bool = False, publications: Sequence[Publication] = ()
) -> Report:
    """Write the report of a study into a folder: the same results give the same bytes.

    Args:
        html: write index.html too, one page that needs no other file.
        publications: put their figures beside the study's (see `flatbench.report.tables.published`).

    Raises InputError if the folder cannot be written.
    """
    folder = Path(folder)
    drawn_figures = beside(lambda: _draw(results, folder / "figures"))
    report = Report(notes=notes(results))
    tables = all_tables(results, publications)
    for table in tables:
        _write_table(table, folder, report)
    pictures, names = drawn_figures()
    report.files += names
    report.files += archive.save(results, folder)
    study = yaml.safe_dump(dict(results.content["study"]), sort_keys=False, allow_unicode=True, width=100)
    _write(folder, "study.yaml", study, report)
    _write(folder, "findings.json", findings_json(results), report)
    _write(folder, "README.md", _readme(results, tables, pictures, report.notes), report)
    if html:
        drawn = [(folder / "figures" / f"{picture.name}.svg").read_text("utf-8") for picture in pictures]
        listed = [name for name in report.files if "/" not in name]
        text = page.render(results, tables, list(zip(pictures, drawn, strict=True)), report.notes, listed)
        _write(folder, "index.html", text, report)
    return report


def _draw(results: Results, folder: Path) -> tuple[list[Figure], list[str]]:
    """Draw and save every figure: what is said of each, and the files' names in the report's folder."""
    pictures, names = [], []
    with style.styled():
        for figure in figures.all_figures(results):
            names += [f"{folder.name}/{name}" for name in style.save(figure.figure, folder, figure.name)]
            pictures.append(replace(figure, figure=None))  # what is saved needs no memory
    return pictures, names


def all_tables(results: Results, publications: Sequence[Publication] = ()) -> list[Table]:
    """Every table that the results allow, the main one first."""
    made = [
        glance.methods_table(results),
        results_table(results),
        overview_table(results),
        evidence.comparisons_table(results),
        evidence.aggregates_table(results),
        published.published_table(results, publications) if publications else None,
        flatness_table(results),
        evidence.correlations_table(results),
        interference.interference_table(results),
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
    if table.readable:
        title = f"# {markdown(table.title)}\n\n"
        _write(folder, f"{table.name}.md", title + render.to_markdown(table), report)
        _write(folder, f"{table.name}.tex", render.to_latex(table), report)


def _readme(
    results: Results, tables: Sequence[Table], pictures: Sequence[Figure], remarks: Sequence[str]
) -> str:
    """The answer with one figure and what stands against it, one main table, and everything else folded."""
    by_name = {table.name: table for table in tables}
    shown = [name for name in _SECTIONS if name in by_name and by_name[name].readable]
    lines = [f"# {markdown(results.name)}", "", markdown(answer.question(results)), ""]
    lines += ["## What was found", "", *(f"- {markdown(line)}" for line in findings(results)), ""]
    first = main_figure(pictures)
    if first is not None:
        lines += _picture(first)
    if held := answer.reservations(results):
        lines += ["> **Before you rely on it**", ">", *(f"> - {markdown(text)}" for text in held), ""]
    for i, name in enumerate(shown):
        table = by_name[name]
        if name == "correlations":  # those within one method are in the table's own file
            table = replace(table, parts=table.parts[:1])
        body = [render.to_markdown(table, level=3)]
        body += [text, ""] if (text := explanations(results).get(name, "")) else []
        lines += [f"## {table.title}", "", *body] if i == 0 else _fold(table.title, body)
        if i == 0:
            lines += _statements(results)
    if remarks:
        lines += _fold("Remarks on runs and measures", [*(f"- {markdown(note)}" for note in remarks), ""])
    rest = [p for p in pictures if p is not first and p.name != "differences_column"]
    if rest:
        lines += _fold("Figures", [line for picture in rest for line in _picture(picture)])
    if "selection" in by_name and by_name["selection"].readable:
        text = render.to_markdown(by_name["selection"], level=3)
        lines += _fold("Selection on validation data", [text])
    lines += _reproduction(results)
    lines += ["## Files", "", *_file_list(tables), ""]
    return "\n".join(lines)


def main_figure(pictures: Sequence[Figure]) -> Figure | None:
    """The figure that shows the answer: differences with intervals, or else the first there is."""
    return next((p for p in pictures if p.name == "differences"), next(iter(pictures), None))


def _fold(title: str, body: Sequence[str]) -> list[str]:
    """A section that GitHub shows closed."""
    return ["<details>", f"<summary>{markdown(title)}</summary>", "", *body, "</details>", ""]


def _picture(picture: Figure) -> list[str]:
    return [f"![{markdown(picture.alt)}](figures/{picture.name}.png)", "", markdown(picture.caption), ""]


def _statements(results: Results) -> list[str]:
    """Every statement, folded under its question."""
    lines: list[str] = []
    for name, own in by_question(results).items():
        texts = [f"- {markdown(sentence(s))}" for s in own if s.role == "main" or len(own) <= _STATEMENTS]
        lines += _fold(f"{QUESTIONS[name]} Every statement", [*texts, ""])
    return lines


#: of more statements the further ones are in findings.json alone
_STATEMENTS = 40

#: tables in the README, the first of them open; the others are files beside it
_SECTIONS = (
    "methods",
    "overview",
    "results",
    "comparisons",
    "aggregates",
    "published",
    "flatness",
    "correlations",
    "interference",
    "cost",
    "measures",
)


def _reproduction(results: Results) -> list[str]:
    """The commands and the machines behind the numbers."""
    lines = [
        "## How it was made",
        "",
        provenance.STUDY_FILE,
        "",
        "```sh",
        *provenance.commands(results),
        "```",
        "",
    ]
    machines = [f"- {markdown(text)}" for text in provenance.machines(results)]
    return [*lines, *machines, ""] if machines else lines


def _file_list(tables: Sequence[Table]) -> Iterator[str]:
    for table in tables:
        endings = ["md", "csv", "tex"] if table.readable else ["csv"]
        links = ", ".join(f"[{ending}]({table.name}.{ending})" for ending in endings)
        yield f"- {table.title}: {links}"
    yield (
        "- What is said, as data: claim, estimate, interval, n, basis, reservations: "
        "[findings.json](findings.json)"
    )
    yield "- Figures: PNG, PDF and SVG in [figures](figures)"
    yield f"- The runs, tidy; `flatbench report` makes all of this from it: [{archive.NAME}]({archive.NAME})"
    yield "- The study: [study.yaml](study.yaml)"
