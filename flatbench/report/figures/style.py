"""Style of a report's figures: size, font, and colours and markers that tell methods apart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatbench.errors import visible
from flatbench.store.files import replacing

#: widths in inches of a column and of a page with two columns
COLUMN, PAGE = 3.5, 7.16
FORMATS = ("png", "pdf", "svg")

_MARKERS = "osD^vPX*<>phd8"
#: seaborn's colour-blind palette in an order that sets neighbours apart, and four dark colours that it lacks
_COLOURS = (
    *("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#56b4e9", "#949494", "#ca9161", "#ece133"),
    *("#fbafe4", "#332288", "#1a1a1a", "#882255", "#6b6b00"),
)
_LINES: Sequence[Any] = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1)), (0, (1, 1)))
_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "axes.axisbelow": True,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "flatbench",
}


@dataclass(frozen=True)
class Look:
    """How one method is drawn: told apart by colour, and without colour by marker and line."""

    colour: Any
    marker: str
    line: Any


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """The look of each method, the same in every figure of a study: no colour and no marker twice up to
    14."""
    count = len(_COLOURS)
    return {
        name: Look(_COLOURS[i % count], _MARKERS[(i + i // count) % count], _LINES[i % len(_LINES)])
        for i, name in enumerate(methods)
    }


def panels(count: int, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with ``count`` panels: one as wide as a column, more side by side on a page's width.

    Args:
        columns: at most so many side by side.
    """
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    width = COLUMN if columns == 1 else PAGE
    height = 2.7 if columns == 1 else 2.3 * rows + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = [axis for row in grid for axis in row]
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def wrap_labels(axes: Sequence[Any]) -> None:
    """Break the axes' names so that they fit beside each other."""
    for axis in axes:
        axis.set_xlabel(textwrap.fill(plain(axis.get_xlabel()), 30))
        axis.set_ylabel(textwrap.fill(plain(axis.get_ylabel()), 24))


def wrapped(text: str, width: int) -> str:
    """Text over several lines, shown as it is."""
    return textwrap.fill(plain(text), width)


def styled() -> Any:
    """A context in which figures are made and saved, whatever the user's own settings are."""
    from matplotlib import rc_context, rcParamsDefault

    settings: dict[Any, Any] = {key: value for key, value in rcParamsDefault.items() if key != "backend"}
    return rc_context(settings | _SETTINGS)


def plain(text: str) -> str:
    """Text that matplotlib shows as it is: a condition may hold dollar signs."""
    return text.replace("$", r"\$")


def stem(text: str) -> str:
    """A file's name without its ending from a text of any kind: nothing that leads out of a folder."""
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text)[:100]


def log_scale(axis: Any, low: float, high: float) -> None:
    """A logarithmic x axis with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set_xscale("log")
    if high < 3 * low:  # powers of ten and their halves may all lie outside
        axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend(figure: Any, handles: dict[str, Any], columns: int | None = None) -> None:
    """One legend for all panels, below them; of as many columns as short names leave room for."""
    if handles:
        columns = columns or min(len(handles), 3 if figure.get_figwidth() <= COLUMN else 6)
        figure.legend(
            list(handles.values()),
            [plain(name) for name in handles],
            loc="outside lower center",
            ncols=columns,
            handlelength=2.6,
        )


def save(figure: Any, folder: Path, name: str) -> list[str]:
    """Write a figure in every format; equal figures give equal bytes. Returns the names of the files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for text in figure.findobj(Text):  # matplotlib warns of characters that no font has
        text.set_text(visible(text.get_text()))
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    figure.set_layout_engine(None)  # what was laid out once holds for every format, which is drawn once
    undated: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        "svg": {"Date": None, "Creator": None},
    }
    names = [f"{name}.{ending}" for ending in FORMATS]
    for file, ending in zip(names, FORMATS, strict=True):
        with replacing(folder / file) as temporary:
            figure.savefig(temporary, format=ending, dpi=200, metadata=undated[ending])
            if ending == "svg":  # its texts are texts, and labels of ticks are made as it is drawn
                drawn = temporary.read_text(encoding="utf-8")
                temporary.write_text(visible(drawn, kept="\n\t"), encoding="utf-8")
    return names
