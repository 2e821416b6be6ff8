"""Figures that relate the test metric to flatness and to cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.correlation import MAX_RUNS
from flatbench.report.analysis.quantities import Quantity, lower_first, metric, relative_time
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import MIN_CLUSTERS, clustered_bootstrap
from flatbench.report.analysis.summary import summary
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure, axis_metric, pages
from flatbench.report.numbers import significant


def metric_against_flatness(results: Results, quantity: Quantity) -> Iterator[Figure]:
    """Test metric against one sharpness: a small point a run, a large one for each method's mean."""
    from matplotlib.ticker import MaxNLocator

    final = results.final
    final = final.assign(x=pd.to_numeric(final[quantity.column], errors="coerce").astype(float))
    usable = final.dropna(subset=["x", "test"])
    conditions = [c for c in results.conditions if (usable["condition"] == c).any()]
    looks = style.looks(results.methods)
    log = bool((usable["x"] > 0).all() and usable["x"].max() > 10 * usable["x"].min())

    def draw(axis: Any, condition: str, handles: dict[str, Any]) -> None:
        runs = usable[usable["condition"] == condition]
        shown = axis_metric(runs)
        for method, own in runs.groupby("method", sort=False):
            look = looks[str(method)]
            axis.plot(own["x"], own["test"] * shown.scale, look.marker, color=look.colour, alpha=0.5, ms=3)
            (handles[str(method)],) = axis.plot(
                # where the axis is logarithmic, so is the middle
                np.exp(np.log(own["x"]).mean()) if log else own["x"].mean(),
                own["test"].mean() * shown.scale,
                look.marker,
                color=look.colour,
                ms=7,
                mec="k",
            )
        if log:
            style.log_scale(axis, runs["x"].min(), runs["x"].max())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        _draw_fit(axis, runs, shown.scale, log, handles)
        axis.set_xlabel(quantity.header)
        axis.set_ylabel(shown.header("Test"))

    name = f"metric_vs_{style.stem(quantity.column)}"
    for stem, figure in pages(results, conditions, name, draw):
        yield Figure(
            stem,
            f"Test metric against {lower_first(quantity.header)}: a small point a run, a large one the "
            f"{'geometric ' if log else ''}mean of a method.{_FIT_NOTE if _has_fit(usable) else ''}",
            f"Scatter plot. {_means_in_words(usable, 'x', quantity.header)}",
            figure,
        )


_FIT_NOTE = (
    " Least-squares line over all runs with its 95 % interval (bootstrap clustered by configuration); it "
    "says nothing about any one method."
)
_KEYS = ["condition", "method", "configuration"]


def _has_fit(runs: pd.DataFrame) -> bool:
    """Whether some condition has enough configurations for a fit with an interval."""
    counts = runs.drop_duplicates(_KEYS)["condition"].value_counts()
    return bool((counts >= MIN_CLUSTERS).any())


def _draw_fit(axis: Any, runs: pd.DataFrame, scale: float, log: bool, handles: dict[str, Any]) -> None:
    """A straight line over the runs of a condition, straight in log x on a logarithmic axis."""
    if len(runs) > MAX_RUNS:
        runs = runs.groupby(_KEYS, sort=False, as_index=False)[["x", "test"]].mean()
    clusters = runs.groupby(_KEYS, sort=False).ngroup().to_numpy()
    if len(set(clusters)) < MIN_CLUSTERS or runs["x"].nunique() < 2:
        return
    x, y = runs["x"].to_numpy(), runs["test"].to_numpy() * scale
    places = np.geomspace(x.min(), x.max(), 15) if log else np.linspace(x.min(), x.max(), 15)
    u, at = (np.log(x), np.log(places)) if log else (x, places)

    def predicted(place: float) -> Any:
        def line(weights: Any) -> Any:
            total = weights.sum(axis=1, keepdims=True)
            du, dy = u - weights @ u[:, None] / total, y - weights @ y[:, None] / total
            slope = (weights * du * dy).sum(axis=1) / (weights * du * du).sum(axis=1)
            return (weights @ y) / total[:, 0] + slope * (place - (weights @ u) / total[:, 0])

        return line

    bands = [clustered_bootstrap(predicted(place), clusters, resamples=300) for place in at]
    (line,) = axis.plot(places, [band.estimate for band in bands], color="0.3", lw=1, zorder=1)
    axis.fill_between(
        places,
        [band.low for band in bands],
        [band.high for band in bands],
        color="0.5",
        alpha=0.2,
        lw=0,
        zorder=0,
    )
    handles["fit, 95 % interval"] = line


def _means_in_words(runs: pd.DataFrame, column: str, name: str, limit: int = 12) -> str:
    """Each method's means, for those who do not see the figure."""
    parts = []
    for (condition, method), own in runs.groupby(["condition", "method"], sort=False):
        shown = axis_metric(own)
        where = f"{method} ({condition})" if condition else str(method)
        means = (own[column].mean(), own["test"].mean() * shown.scale)
        parts.append(f"{where}: {', '.join(significant(mean, 3) for mean in means)}")
    more = f"; and {len(parts) - limit} more" if len(parts) > limit else ""
    return f"Means of {lower_first(name)} and test metric: {'; '.join(parts[:limit])}{more}."


def metric_against_cost(results: Results) -> Iterator[Figure]:
    """Test metric against time per step, with the methods that no other beats in both."""
    relative = relative_time(results)
    known = results.final[relative.column].notna().any()
    column, header = (relative.column, relative.header) if known else ("step_ms", "Time per step (ms)")
    usable = results.final.dropna(subset=[column, "test"])
    means = summary(results).dropna(subset=[f"{column}_mean", "test_mean"])
    conditions = [c for c in results.conditions if (usable["condition"] == c).any()]
    looks = style.looks(results.methods)

    def draw(axis: Any, condition: str, handles: dict[str, Any]) -> None:
        rows = means[means["condition"] == condition]
        shown = metric(str(rows["metric"].iloc[0]))
        for method, own in rows.groupby("method", sort=False):
            look = looks[str(method)]
            handles[str(method)] = axis.errorbar(
                own[f"{column}_mean"],
                own["test_mean"] * shown.scale,
                xerr=own[f"{column}_std"],  # NaN of a single run: no bar
                yerr=own["test_std"] * shown.scale,
                fmt=look.marker,
                color=look.colour,
                ms=6 if len(own) == 1 else 3.5,
                mec="k",
                mew=0.5,
                elinewidth=0.8,
            )
        front = pareto_front(rows[f"{column}_mean"], rows["test_mean"])
        best = rows.loc[front].sort_values(f"{column}_mean")
        (handles["Pareto front"],) = axis.plot(
            best[f"{column}_mean"],
            best["test_mean"] * shown.scale,
            color="0.4",
            ls=":",
            lw=1,
            drawstyle="steps-post",
            zorder=0,
        )
        axis.set_xlabel(header)
        axis.set_ylabel(shown.header("Test"))

    for stem, figure in pages(results, conditions, "metric_vs_cost", draw):
        yield Figure(
            stem,
            f"Test metric against {lower_first(header)}, mean ± standard deviation over seeds. The Pareto "
            "front joins the methods that no other beats in both.",
            f"Scatter plot with error bars. {_means_in_words(usable, column, header)}",
            figure,
        )


def pareto_front(cost: pd.Series[float], gain: pd.Series[float]) -> pd.Index[Any]:
    """Index of the points that no other point beats: less cost and at least as much gain, or the reverse."""
    beaten = [
        bool((((cost <= c) & (gain > g)) | ((cost < c) & (gain >= g))).any())
        for c, g in zip(cost, gain, strict=True)
    ]
    return cost.index[[not b for b in beaten]]
