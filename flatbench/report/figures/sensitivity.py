"""Figures over settings: how much hyper-parameters matter, and how methods do over all conditions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.differences import shared_metric
from flatbench.report.analysis.quantities import metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import performance_profile
from flatbench.report.analysis.summary import summary
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure, chosen, missing, named, pages
from flatbench.report.numbers import significant


def scores(results: Results) -> pd.DataFrame:
    """Every configuration's mean validation score: condition, method, score and its hyper-parameters."""
    if results.tuned:
        entries = [e for e in results.selection if e["score"] is not None]
        labels = [{key: e[key] for key in ("condition", "method", "score")} for e in entries]
        return pd.DataFrame([{**label, **e["choice"]} for label, e in zip(labels, entries, strict=True)])
    hyper = [c for c in results.final.columns if str(c).startswith("hyper.")]
    keys = ["condition", "method", "configuration"]
    grouped = results.final.groupby(keys, sort=False)
    found = grouped[hyper].first().assign(score=grouped["validation"].mean()).reset_index()
    return found.rename(columns=lambda c: str(c).removeprefix("hyper.")).dropna(subset=["score"])


def sensitivity(results: Results) -> Iterator[Figure]:
    """For every number among the hyper-parameters: the best validation score at each of its values."""
    table = scores(results)
    names = [c for c in table.columns if c not in ("condition", "method", "configuration", "score")]
    for name in names:
        values = pd.to_numeric(table[name], errors="coerce")
        varied = values.groupby(table["method"]).nunique().max() if len(values) else 0
        if values.dtype == bool or not varied > 2:
            continue  # two points show no course, and the table of the selection has them
        yield from _sensitivity(results, table.assign(x=values).dropna(subset=["x"]), str(name))


def _sensitivity(results: Results, table: pd.DataFrame, name: str) -> Iterator[Figure]:
    best = (
        table.groupby(["condition", "method", "x"], sort=False)["score"].max().reset_index().sort_values("x")
    )
    conditions = [c for c in results.conditions if (best["condition"] == c).any()]
    looks = style.looks(results.methods)
    metrics = dict(zip(summary(results)["condition"], summary(results)["metric"], strict=True))
    wanted = (results.content["study"].get("tune") or {}).get("metric")
    log = best["x"].min() > 0 and best["x"].max() >= 4 * best["x"].min()

    def draw(axis: Any, condition: str, handles: dict[str, Any]) -> None:
        shown = metric(str(wanted or metrics[condition]))
        for method, own in best[best["condition"] == condition].groupby("method", sort=False):
            look = looks[str(method)]
            (handles[str(method)],) = axis.plot(
                own["x"], own["score"] * shown.scale, color=look.colour, ls=look.line, marker=look.marker
            )
        if log:
            style.log_scale(axis, best["x"].min(), best["x"].max())
        if best["x"].nunique() <= 6:
            axis.set_xticks(sorted(best["x"].unique()), minor=False)
            axis.set_xticks([], minor=True)
        axis.set_xlabel({"lr": "Learning rate", "rho": "Radius rho"}.get(name, name))
        axis.set_ylabel(shown.header("Validation"))

    words = [
        f"{named(method, condition)} best at {own['x'].iloc[int(own['score'].argmax())]:g}"
        for (condition, method), own in best.groupby(["condition", "method"], sort=False)
    ]
    stem = "sensitivity_" + style.stem(name)
    for page, figure, lacking in pages(results, conditions, stem, draw):
        yield Figure(
            page,
            f"Sensitivity to {name}: the best validation score that any configuration with this value "
            f"reached, a mean over {'the tuning ' if results.tuned else ''}seeds.{lacking}",
            f"Line plot. {'; '.join(words[:12])}.",
            figure,
        )


def profile(results: Results) -> Iterator[Figure]:
    """Performance profiles: the share of runs above each test metric, averaged over conditions.

    None of a study in which nothing was chosen: it has no runs that stand for a method.
    """
    shown = shared_metric(results)
    runs = results.representatives.dropna(subset=["test"])
    if len(results.conditions) < 2 or shown is None or runs.empty or chosen(results):
        return  # configurations that nothing chose but the final runs would be compared
    looks = style.looks(results.methods)
    limits = np.linspace(runs["test"].min(), runs["test"].max(), 201)
    handles: dict[str, Any] = {}
    figure, (axis,) = style.panels(1)
    words = []
    for method in results.methods:
        own = runs[runs["method"] == method]
        if own["condition"].nunique() < len(results.conditions):
            continue  # a profile over fewer tasks is not comparable
        shares = performance_profile([g.to_numpy() for _, g in own.groupby("condition")["test"]], limits)
        look = looks[method]
        (handles[method],) = axis.plot(
            limits * shown.scale, shares, color=look.colour, ls=look.line, marker=look.marker, markevery=25
        )
        half = limits[shares >= 0.5].max(initial=limits[0]) * shown.scale
        words.append(f"{method} half above {significant(half, 3)}")
    axis.set_xlabel(shown.header("Test"))
    axis.set_ylabel("Share of runs above")
    style.legend(figure, handles)
    yield Figure(
        "performance_profile",
        "Performance profiles over all conditions (Agarwal et al. 2021): the share of runs above each value, "
        f"a mean over conditions; higher is better.{missing(results, results.conditions, handles)}",
        f"Line plot. {'; '.join(words)}.",
        figure,
    )
