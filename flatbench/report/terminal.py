"""A report in a terminal: the answer, what stands against it, and one table that fits its width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group
from rich.markup import escape
from rich.table import Table as RichTable

from flatbench.report.analysis.results import Results
from flatbench.report.tables.averages import Part, overview_table, results_table
from flatbench.report.tables.cells import Cell, one_line
from flatbench.report.tables.glance import methods_table
from flatbench.report.text import answer
from flatbench.report.text.findings import findings

#: columns that say what a row is about: they stand in every piece of a table that is too wide
_NAMES = ("Method", "Condition", "Quantity", "Setting")
#: cells up to so many characters stay on one line
_WIDEST = 24
#: characters between two columns: two of padding and one between
_GAP = 3


@dataclass(frozen=True)
class Fitted:
    """A part of a table for any width: no name is cut, and what does not fit goes into further pieces.

    Attributes:
        remarks: show the remarks of cells; those of numbers of runs are always shown.
    """

    part: Part
    remarks: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable | str]:
        """The pieces, one below the other."""
        shown = self.part.shown
        headers = list(map(str, shown.columns))
        cells = {h: [self._text(cell, h) for cell in shown[h]] for h in headers}
        least = {h: _minimum_width(h, cells[h]) for h in headers}
        names = [h for h in headers if h in _NAMES] or headers[:1]
        title = escape(one_line(self.part.caption)) or None
        for kept in _pieces(headers, names, least, options.max_width):
            table = RichTable(
                title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
            )
            widths = _widths(kept, least, cells, options.max_width)
            for header in kept:
                known = any(cell.value is not None for cell in shown[header])
                table.add_column(
                    escape(header),
                    justify="right" if known else "left",
                    width=widths[header],
                    overflow="fold",
                )
            for i in range(len(shown)):
                table.add_row(*(_style(shown[h].iloc[i], cells[h][i]) for h in kept))
            yield table
            yield ""
            title = None

    def _text(self, cell: Cell, header: str) -> str:
        return (cell if self.remarks or header == "Final runs" else replace(cell, remark="")).plain()


def _style(cell: Cell, text: str) -> str:
    return f"[bold]{escape(text)}[/bold]" if cell.rank == 1 else escape(text)


def _minimum_width(header: str, texts: Sequence[str]) -> int:
    """Characters that a column needs so that no word of its header and none of its short cells is broken."""
    words = max((len(word) for word in header.split()), default=1)
    cells = [len(text) if len(text) <= _WIDEST else max(map(len, text.split())) for text in texts]
    return max(words, *cells, 1) if cells else words


def _widths(kept: Sequence[str], least: Any, cells: Any, width: int) -> dict[str, int]:
    """What each column needs, and of what is left as much as its cells and its header can use, in order."""
    found = {h: min(least[h], width) for h in kept}
    left = width - sum(found.values()) - _GAP * (len(kept) - 1)
    for h in kept:
        more = min(max(map(len, [h, *cells[h]])) - found[h], left)
        if more > 0:
            found[h] += more
            left -= more
    return found


def _pieces(headers: Sequence[str], names: Sequence[str], least: Any, width: int) -> Iterator[list[str]]:
    """The columns of each piece, the names first in every one."""
    start = sum(least[h] + _GAP for h in names) - _GAP
    piece, used = list(names), start
    for header in headers:
        if header in names:
            continue
        if used + _GAP + least[header] > width and len(piece) > len(names):
            yield piece
            piece, used = list(names), start
        piece.append(header)
        used += least[header] + _GAP
    yield piece


def in_short(results: Results) -> Group:
    """The answer of a report, what stands against it, and the table that it rests on."""
    lines: list[Any] = [escape(f"{results.name}: {answer.question(results)}"), ""]
    lines += [escape(f"- {text}") for text in findings(results)]
    if held := answer.reservations(results):
        lines += ["", "Before you rely on it:", *(escape(f"- {text}") for text in held)]
    return Group(*lines, "", *(Fitted(part, remarks=False) for part in _parts(results)), *_choices(results))


def _parts(results: Results) -> list[Part]:
    """One condition's methods with what was chosen; of several conditions, or whole grids, every method on
    a line."""
    main = results_table(results)
    single = (
        len(main.parts) == 1 and not main.parts[0].shown["Method"].map(lambda c: c.text).duplicated().any()
    )
    if not single:
        short = methods_table(results) or overview_table(results)
        return list(short.parts) if short is not None else list(main.parts)
    return [_fewer(part) for part in main.parts]


def _fewer(part: Part) -> Part:
    """Without what says how it was tuned, and without numbers of runs where every run is there."""
    headers = [h for h in map(str, part.shown) if _is_shown(h, part)]
    return replace(part, shown=part.shown[headers])


def _is_shown(header: str, part: Part) -> bool:
    if header == "Final runs":
        return any(cell.remark for cell in part.shown[header])
    told = ("Configurations tried", "Gradients per step")  # the second in the answer
    return header not in told and not header.startswith(("Validation", "Generalization"))


def _choices(results: Results) -> Iterator[str]:
    if results.tuned:
        budgets = sorted({(b["trials"], len(b["tuning_seeds"])) for b in results.content["budget"].values()})
        tried = " or ".join(
            f"{trials} configurations × {seeds} tuning seed{'s' if seeds != 1 else ''}"
            for trials, seeds in budgets
        )
        yield f"Chosen on validation data; every method tried {tried}."
