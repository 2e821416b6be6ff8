"""Tables as Markdown, LaTeX and CSV text."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from flatbench.errors import visible
from flatbench.report.numbers import rounded_frame
from flatbench.report.tables import cells
from flatbench.report.tables.averages import Part, Table


def to_markdown(table: Table, level: int = 2) -> str:
    """The shown parts as GitHub's Markdown, each under its caption if there are several."""
    texts = []
    for part in table.parts:
        if len(table.parts) > 1:
            texts.append(f"{'#' * level} {cells.markdown(part.caption)}\n")
        texts.append(_markdown_part(part) + "\n")
    return "\n".join(texts)


def _markdown_part(part: Part) -> str:
    if part.shown.empty:
        return "Nothing yet."
    shown = part.shown.map(lambda cell: cell.markdown())
    shown.columns = pd.Index([cells.markdown(header) for header in part.shown.columns])
    numeric = ["right" if any(c.value is not None for c in part.shown[h]) else "left" for h in part.shown]
    # numbers are text already: tabulate must not read and round them again
    return str(shown.to_markdown(index=False, disable_numparse=True, colalign=numeric))


def to_latex(table: Table) -> str:
    """The shown parts as booktabs tables, ready for ``\\input``; needs ``\\usepackage{booktabs}``."""
    texts = []
    for i, part in enumerate(table.parts):
        if part.shown.empty:
            continue
        shown = part.shown.map(lambda cell: cell.latex())
        shown.columns = pd.Index([cells.latex(header) for header in part.shown.columns])
        numeric = ["r" if any(c.value is not None for c in part.shown[h]) else "l" for h in part.shown]
        label = re.sub(r"[^A-Za-z0-9-]+", "-", f"{table.name}-{i}" if len(table.parts) > 1 else table.name)
        texts.append(
            shown.style.hide(axis="index").to_latex(
                hrules=True,
                column_format="".join(numeric),
                caption=cells.latex(f"{table.title}, {part.caption}"),
                label=f"tab:{label}",
                position="tb",
                position_float="centering",
            )
        )
    return "\n".join(texts)


def to_csv(table: Table) -> str:
    """The plain numbers, to 12 significant digits.

    A text that a spreadsheet would compute begins with an apostrophe.
    """
    data = rounded_frame(table.data)
    data = data.apply(lambda c: c if pd.api.types.is_numeric_dtype(c) else c.map(_no_formula))
    data.columns = pd.Index([_no_formula(name) for name in data.columns])
    return str(data.to_csv(index=False, lineterminator="\n"))


def _no_formula(value: Any) -> Any:
    """``=HYPERLINK(…)`` and its like as the text that they are, with control characters written out.

    Other values are as they came.
    """
    if not isinstance(value, str):
        return value
    # pandas writes it unquoted, and spreadsheets begin a row there
    value = visible(value.replace("\r", " "), kept="\n\t")
    return f"'{value}" if value.lstrip().startswith(("=", "+", "-", "@")) else value
