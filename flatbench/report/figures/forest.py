"""Differences to the reference with their intervals: the figure that a report opens with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from flatbench.report.analysis.differences import ALL, difference_scale, differences
from flatbench.report.analysis.quantities import condition_words, lower_first
from flatbench.report.analysis.results import Results
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure, missing
from flatbench.report.text.sentences import with_interval
from flatbench.report.text.statements import statements

#: comparisons of one panel; more do not fit a screen, and are in the tables
_ROWS = 30
#: inches: it stands beside the answer, on half a screen
_WIDTH = 5.6


def forest(results: Results) -> Iterator[Figure]:
    """Test metric and primary flatness of every method minus, or over, the reference's."""
    data = differences(results)
    if data.empty or not data["low"].notna().any():
        return
    data = data[data["role"] == "main"]
    groups = [rows.head(_ROWS) for _, rows in data.groupby("quantity", sort=False)]
    looks = style.looks(results.methods)
    longest = max(map(len, groups))
    size = (_WIDTH if len(groups) > 1 else style.COLUMN, 1.1 + 0.2 * longest)
    wide, axes = style.panels(len(groups))
    # one below the other for a column, and for a small screen
    narrow, below = style.panels(len(groups), columns=1)
    narrow.set_size_inches(style.COLUMN, sum(0.75 + 0.17 * len(rows) for rows in groups))
    wide.set_size_inches(*size)
    for place in (axes, below):
        for axis, rows in zip(place, groups, strict=True):
            _draw(results, axis, rows, looks, 30 if place is axes else 48)
    base = str(data["reference"].iloc[0])
    texts = [
        f"{s.subject}{f' with {condition_words(s.condition)}' if s.condition not in ('', ALL) else ''} "
        f"{lower_first(s.quantity)} {with_interval(s)}"
        for s in statements(results)
        if s.kind == "difference" and s.role == "main"
    ]
    over = " Over all conditions where they are compared on one scale." if len(results.conditions) > 1 else ""
    lacking = missing(results, results.conditions, {base, *data["method"]})
    for name, figure in (("differences", wide), ("differences_column", narrow)):
        if figure is narrow and len(groups) == 1:
            continue
        yield Figure(
            name,
            f"Differences to {base}, paired by seed, with 95 % intervals that are simultaneous over all "
            "comparisons shown: filled where the interval excludes zero difference (the dashed line)."
            f"{over}{lacking}",
            f"Forest plot. {'; '.join(texts[:24])}.",
            figure,
        )


def _draw(results: Results, axis: Any, rows: pd.DataFrame, looks: Any, width: int) -> None:
    entries = rows.to_dict("records")
    ratio = entries[0]["scale"] == "ratio"
    several = rows["condition"].nunique() > 1
    for place, row in enumerate(reversed(entries)):
        shown = (
            1.0 if ratio or row["quantity"] not in ("test", "gap") else difference_scale(results, row).scale
        )
        look = looks[row["method"]]
        estimate, low, high = (row[k] * shown for k in ("estimate", "low", "high"))
        if low == low:
            axis.plot([low, high], [place, place], color=look.colour, lw=1.6)
        filled = row["verdict"] == "differs"
        axis.plot(
            [estimate],
            [place],
            look.marker,
            color=look.colour,
            ms=5.5,
            mfc=look.colour if filled else "white",
        )
    names = [
        f"{row['method']}, {condition_words(row['condition'])}" if several else row["method"]
        for row in reversed(entries)
    ]
    axis.set_yticks(range(len(entries)), [style.plain(name) for name in names])
    axis.set_ylim(-0.7, len(entries) - 0.3)
    axis.axvline(1.0 if ratio else 0.0, color="0.35", lw=0.9, ls="--", zorder=0)
    base, header = entries[0]["reference"], entries[0]["header"]
    if ratio:
        known = rows[["estimate", "low", "high"]]
        style.log_scale(axis, float(known.min().min()), float(known.max().max()))
        axis.set_xlabel(style.wrapped(f"{header}: times {base}'s; flatter to the left", width))
    else:
        side = "" if entries[0]["quantity"] == "test" else "; flatter to the left"
        axis.set_xlabel(style.wrapped(f"{header} minus {base}'s{side}", width))
