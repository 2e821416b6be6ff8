"""Shared parts of figures: a finished figure, and a panel for every condition."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
) -> Iterator[tuple[str, Any, str]]:
    """A figure with a panel a condition, or several of them, and what is missing from it, in words.

    Args:
        draw: fills one panel and adds the handles of its legend, by method.
    """
    for page, start in enumerate(range(0, len(conditions), _PANELS), start=1):
        chosen = conditions[start : start + _PANELS]
        figure, axes = style.panels(len(chosen))
        handles: dict[str, Any] = {}
        for axis, condition in zip(axes, chosen, strict=True):
            draw(axis, condition, handles)
            if len(results.conditions) > 1:  # also where it is the only one that has numbers
                axis.set_title(style.plain(condition_words(condition)))
        style.wrap_labels(axes)
        ordered = {name: handles[name] for name in [*results.methods, *handles] if name in handles}
        style.legend(figure, ordered)
        stem = name if len(conditions) <= _PANELS else f"{name}_{page}"
        yield stem, figure, missing(results, conditions, handles)


def missing(results: Results, conditions: Collection[str], methods: Collection[str]) -> str:
    """A sentence that names the study's conditions and methods that a figure lacks; "" if it has all."""
    lost = [condition_words(c) for c in results.conditions if c not in conditions]
    lost += [m for m in results.methods if m not in methods]
    return f" Not shown, for want of numbers: {', '.join(lost)}." if lost else ""


def chosen(results: Results) -> str:
    """Which of a method's configurations a curve is of, where the study chose none; "" where it did."""
    if (
        results.tuned
        or not results.final.groupby(["condition", "method"])["configuration"].nunique().gt(1).any()
    ):
        return ""
    return " Of each method the configuration with the best mean validation metric."


def named(method: Any, condition: Any) -> str:
    """A method under a condition, in words."""
    return f"{method} ({condition_words(str(condition))})" if condition else str(method)


def axis_metric(runs: pd.DataFrame) -> Metric:
    """How the main metric of one condition's runs is shown."""
    return metric(str(runs["metric"].iloc[0]))
