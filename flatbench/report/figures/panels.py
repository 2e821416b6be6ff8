"""Shared parts of figures: a finished figure, and a panel for every condition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from flatbench.report.analysis.quantities import Metric, condition_words, metric
from flatbench.report.analysis.results import Results
from flatbench.report.figures import style

#: panels of one figure; more conditions go on to another
_PANELS = 12


@dataclass(frozen=True)
class Figure:
    """A finished figure.

    Attributes:
        name: stem of its files.
        caption: what it shows, as a sentence.
        alt: the same for someone who does not see it, with its numbers.
        figure: matplotlib's figure.
    """

    name: str
    caption: str
    alt: str
    figure: Any


def pages(
    results: Results, conditions: list[str], name: str, draw: Callable[[Any, str, dict[str, Any]], None]
) -> Iterator[tuple[str, Any]]:
    """A figure with a panel a condition, or several of them; ``draw`` fills one and adds legend handles."""
    for page, start in enumerate(range(0, len(conditions), _PANELS), start=1):
        chosen = conditions[start : start + _PANELS]
        figure, axes = style.panels(len(chosen))
        handles: dict[str, Any] = {}
        for axis, condition in zip(axes, chosen, strict=True):
            draw(axis, condition, handles)
            if len(conditions) > 1:
                axis.set_title(style.plain(condition_words(condition)))
        style.wrap_labels(axes)
        ordered = {name: handles[name] for name in [*results.methods, *handles] if name in handles}
        style.legend(figure, ordered)
        yield (name if len(conditions) <= _PANELS else f"{name}_{page}"), figure


def axis_metric(runs: pd.DataFrame) -> Metric:
    """How the main metric of one condition's runs is shown."""
    return metric(str(runs["metric"].iloc[0]))
