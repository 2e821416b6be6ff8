"""The report as one self-contained HTML page that opens offline, on a phone, and on paper."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from flatbench.report.analysis.results import Results
from flatbench.report.figures import vector
from flatbench.report.figures.panels import Figure
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import Cell, one_line
from flatbench.report.text import answer, glossary, provenance
from flatbench.report.text.explanations import explanations
from flatbench.report.text.findings import QUESTIONS, by_question, findings
from flatbench.report.text.sentences import sentence

#: links to single runs in a row; a row with more links to the table of runs
_LINKS = 12
#: tables whose rows lead to their runs; the others' rows are the same ones
_LINKED = ("results", "selection")


def render(
    results: Results,
    tables: Sequence[Table],
    figures: Sequence[tuple[Figure, str]],
    remarks: Sequence[str],
    files: Sequence[str] = (),
) -> str:
    """The page.

    Args:
        figures: each figure with its SVG.
        remarks: what a reader has to know first.
        files: names of the files beside the page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flatbench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {figure.name: _figure(figure, svg) for figure, svg in figures}
    narrow = shown.pop("differences_column", None)
    main = shown.get("differences") or next(iter(shown.values()), None)
    # correlations within one method are in the table's own file
    cut = [replace(t, parts=t.parts[:1]) if t.name == "correlations" else t for t in tables]
    seeds = dict(zip(results.table["run"], results.table["seed"], strict=True))
    made = [_table(table, results, seeds) for table in cut if table.rows]
    return environment.get_template("page.html.j2").render(
        name=one_line(results.name),
        question=one_line(answer.question(results), 2000),
        findings=[
            {"lead": one_line(lead), "short": one_line(short, 5000), **_lead(one_line(text, 5000))}
            for (lead, short), text in zip(answer.headlines(results), findings(results), strict=True)
        ],
        reservations=[
            {"text": one_line(text, 5000), "look": _look(text)} for text in answer.reservations(results)
        ],
        remarks=[one_line(text, 5000) for text in remarks],
        statements=[
            {"question": QUESTIONS[name], "texts": [one_line(sentence(s), 5000) for s in own]}
            for name, own in by_question(results).items()
        ],
        first=next(iter(made), None),
        tables=made[1:],
        main=main,
        narrow=narrow,
        figures=[figure for figure in shown.values() if figure is not main],
        glossary=glossary.entries(results),
        study_file=provenance.STUDY_FILE.replace("`", ""),
        commands="\n".join(provenance.commands(results)),
        citation=provenance.citation(results),
        citable=provenance.citable(results, findings(results)),
        files=list(files),
        machines=[one_line(text, 5000) for text in provenance.machines(results)],
    )


def _lead(text: str) -> dict[str, str]:
    """A sentence of the answer, what it is about apart from the rest."""
    start, colon, rest = text.partition(": ")
    return {"start": f"{start}:", "rest": f" {rest}"} if colon else {"start": "", "rest": text}


def _look(text: str) -> str:
    """What to search for to see the runs that a reservation is about; "" if it is about none."""
    found = re.match(r"Of \d+ final runs: \d+ (diverged|failed)", text)
    return found[1] if found else ""


def _figure(figure: Figure, svg: str) -> dict[str, Any]:
    from markupsafe import Markup

    return {
        "name": figure.name,
        "caption": one_line(figure.caption, 5000),
        "alt": one_line(figure.alt, 5000),
        # nothing in it ends the attribute that it stands in
        "data": Markup(vector.address(vector.small(svg))),
    }


def _table(table: Table, results: Results, seeds: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": table.name,
        "title": table.title,
        "explanation": explanations(results).get(table.name, ""),
        "rows": table.rows,
        "parts": [_part(table, part, seeds) for part in _join(table.parts)] if table.readable else [],
    }


def _join(parts: Sequence[Part]) -> list[Part]:
    """Parts of several conditions with the same columns as one, with a column for the condition."""
    if len(parts) < 2 or any(not p.condition for p in parts):
        return list(parts)
    if len({tuple(p.shown.columns) for p in parts}) > 1:
        return list(parts)
    frames = []
    for part in parts:
        frame = part.shown.copy()
        frame.insert(1, "Condition", [Cell(part.condition) for _ in range(len(frame))])
        frames.append(frame)
    runs = [ids for part in parts for ids in part.runs]
    caption = parts[0].caption.removesuffix(f": {parts[0].condition}")
    return [Part(caption, pd.concat(frames, ignore_index=True), runs)]


def _test_first(shown: pd.DataFrame) -> pd.DataFrame:
    """The test metric beside what names the row, so that a small screen shows it without scrolling."""
    names = [n for n in ("Method", "Condition") if n in shown]
    test = [h for h in shown.columns if str(h).startswith("Test ")]
    return shown[[*names, *test, *(h for h in shown.columns if h not in (*names, *test))]]


def _by_seed(runs: Sequence[str], seeds: Mapping[str, int]) -> list[str]:
    """As many runs as get a link, the smallest seeds first."""
    return sorted(runs, key=lambda run: seeds.get(run, 0))[:_LINKS]


def _part(table: Table, part: Part, seeds: Mapping[str, int]) -> dict[str, Any]:
    shown = _test_first(part.shown) if table.name == "results" else part.shown
    linked = bool(part.runs) and table.name in _LINKED
    headers = list(map(str, shown.columns))
    numeric = [any(cell.value is not None for cell in shown[header]) for header in shown]
    rows = [
        {
            "id": f"run-{row[0].text}" if table.name == "runs" else "",
            "cells": [_cell(cell, right) for cell, right in zip(row, numeric, strict=True)],
            "runs": [{"id": run, "seed": seeds.get(run, "run")} for run in _by_seed(part.runs[i], seeds)]
            if linked
            else [],
            "more": max(len(part.runs[i]) - _LINKS, 0) if linked else 0,
        }
        for i, row in enumerate(shown.itertuples(index=False, name=None))
    ]
    return {
        "caption": one_line(part.caption),
        "headers": [{"text": h, "numeric": n} for h, n in zip(headers, numeric, strict=True)],
        "rows": rows,
        "linked": linked,
    }


def _cell(cell: Cell, numeric: bool) -> dict[str, Any]:
    known = cell.value is not None and not math.isnan(cell.value)
    return {
        "text": one_line(cell.text),
        "spread": one_line(cell.spread),
        "remark": one_line(cell.remark),
        "rank": cell.rank,
        "value": f"{cell.value:.6g}" if known and not _is_number(cell.text) else "",
        "numeric": numeric,
    }


def _is_number(text: str) -> bool:
    """Whether a cell sorts by what it shows."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
