"""The report as one self-contained HTML page that opens offline, on a phone, and on paper."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flatbench.report.analysis.results import Results
from flatbench.report.figures.panels import Figure
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import Cell, one_line
from flatbench.report.text import answer, provenance
from flatbench.report.text.explanations import explanations
from flatbench.report.text.findings import QUESTIONS, by_question, findings
from flatbench.report.text.sentences import sentence

#: links to single runs in a row; a row with more links to the table of runs
_LINKS = 12


def render(
    results: Results,
    tables: Sequence[Table],
    figures: Sequence[tuple[Figure, bytes]],
    remarks: Sequence[str],
) -> str:
    """The page.

    Args:
        figures: each figure with its PNG.
        remarks: what a reader has to know first.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flatbench.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        {
            "name": figure.name,
            "caption": one_line(figure.caption, 5000),
            "alt": one_line(figure.alt, 5000),
            "data": "data:image/png;base64," + base64.b64encode(_compact(png)).decode(),
        }
        for figure, png in figures
    ]
    main = next((f for f in shown if f["name"] == "differences"), next(iter(shown), None))
    # correlations within one method are in the table's own file
    cut = [replace(t, parts=t.parts[:1]) if t.name == "correlations" else t for t in tables]
    made = [_table(table, results) for table in cut if table.parts]
    return environment.get_template("page.html.j2").render(
        name=one_line(results.name),
        question=one_line(answer.question(results), 2000),
        findings=[_lead(one_line(text, 5000)) for text in findings(results)],
        reservations=[one_line(text, 5000) for text in answer.reservations(results)],
        remarks=[one_line(text, 5000) for text in remarks],
        statements=[
            {"question": QUESTIONS[name], "texts": [one_line(sentence(s), 5000) for s in own]}
            for name, own in by_question(results).items()
        ],
        first=next(iter(made), None),
        tables=made[1:],
        main=main,
        figures=[figure for figure in shown if figure is not main],
        study_file=provenance.STUDY_FILE.replace("`", ""),
        commands="\n".join(provenance.commands(results)),
        machines=[one_line(text, 5000) for text in provenance.machines(results)],
    )


def _lead(text: str) -> dict[str, str]:
    """A sentence of the answer, what it is about apart from the rest."""
    lead, colon, rest = text.partition(": ")
    return {"lead": lead, "rest": rest} if colon else {"lead": "", "rest": text}


def _compact(png: bytes) -> bytes:
    """The picture in 128 colours, a third of the size: a page of many figures is sent by mail."""
    from PIL import Image

    made = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        few = picture.convert("RGB").quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(made, "PNG", optimize=True)
    return made.getvalue()


def _table(table: Table, results: Results) -> dict[str, Any]:
    return {
        "name": table.name,
        "title": table.title,
        "explanation": explanations(results).get(table.name, ""),
        "rows": sum(len(part.shown) for part in table.parts),
        "parts": [_part(table, part) for part in table.parts],
    }


def _part(table: Table, part: Part) -> dict[str, Any]:
    headers = list(map(str, part.shown.columns))
    numeric = [any(cell.value is not None for cell in part.shown[header]) for header in part.shown]
    rows = [
        {
            "id": f"run-{row[0].text}" if table.name == "runs" else "",
            "cells": [_cell(cell, right) for cell, right in zip(row, numeric, strict=True)],
            "runs": list(part.runs[i])[:_LINKS] if part.runs else [],
            "more": max(len(part.runs[i]) - _LINKS, 0) if part.runs else 0,
        }
        for i, row in enumerate(part.shown.itertuples(index=False, name=None))
    ]
    return {
        "caption": one_line(part.caption),
        "headers": [{"text": h, "numeric": n} for h, n in zip(headers, numeric, strict=True)],
        "rows": rows,
        "linked": bool(part.runs),
    }


def _cell(cell: Cell, numeric: bool) -> dict[str, Any]:
    known = cell.value is not None and not math.isnan(cell.value)
    return {
        "text": one_line(cell.text),
        "spread": one_line(cell.spread),
        "remark": one_line(cell.remark),
        "rank": cell.rank,
        "value": repr(float(cell.value)) if known and cell.value is not None else "",
        "numeric": numeric,
    }
