"""Lines with bands: what figures of training, of slices and of spectra have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from flatbench.report.analysis.results import Results
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure, chosen, named, pages
from flatbench.report.numbers import significant


def spread(grouped: Any) -> pd.DataFrame:
    """Mean, ``lower`` and ``upper``, one standard deviation away, of a grouped column; none of one value."""
    found: pd.DataFrame = grouped.agg(["mean", "std"]).reset_index()
    deviation = found.pop("std").fillna(0.0)
    return found.assign(lower=found["mean"] - deviation, upper=found["mean"] + deviation)


def curves(
    results: Results,
    points: pd.DataFrame,
    name: str,
    label: Callable[[str], str],
    caption: str,
    log: bool = False,
) -> Iterator[Figure]:
    """Lines over epochs from rows of condition, method, run, epoch and y: mean and spread over seeds.

    Args:
        label: a condition's y axis.
        log: draw y on a logarithmic axis.
    """
    grouped = points.groupby(["condition", "method", "epoch"], sort=False)["y"]
    bands = spread(grouped).sort_values("epoch")
    conditions = [c for c in results.conditions if (bands["condition"] == c).any()]
    looks = style.looks(results.methods)

    def draw(axis: Any, condition: str, handles: dict[str, Any]) -> None:
        own = bands[bands["condition"] == condition].rename(columns={"epoch": "x"})
        draw_bands(axis, looks, own, handles)
        if log:
            axis.set_yscale("log")
        axis.set_xlabel("Epoch")
        axis.set_ylabel(label(condition))

    ends = bands.drop_duplicates(["condition", "method"], keep="last").sort_index()
    words = [
        f"{named(r['method'], r['condition'])} {significant(r['mean'], 3)}" for r in ends.to_dict("records")
    ]
    for stem, figure, lacking in pages(results, conditions, name, draw):
        yield Figure(
            stem,
            f"{caption}: mean over seeds, band of one standard deviation.{chosen(results)}{lacking}",
            f"Line plot. At the end: {', '.join(words[:12])}.",
            figure,
        )


def draw_bands(
    axis: Any,
    looks: Mapping[str, style.Look],
    bands: pd.DataFrame,
    handles: dict[str, Any],
    by: str = "method",
) -> None:
    """A line a method, or whatever ``by`` names, through ``x`` and ``mean``, band ``lower`` to ``upper``."""
    for name, own in bands.groupby(by, sort=False):
        look = looks[str(name)]
        own = own.sort_values("x")
        (line,) = axis.plot(
            own["x"],
            own["mean"],
            color=look.colour,
            ls=look.line,
            marker=look.marker,
            ms=3.5,
            markevery=max(1, len(own) // 8),
        )
        axis.fill_between(own["x"], own["lower"], own["upper"], color=look.colour, alpha=0.18, lw=0)
        handles[str(name)] = line
