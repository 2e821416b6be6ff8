"""Figures that relate the test metric to flatness and to cost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.quantities import Quantity, lower_first, main_cost, metric, timed
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import summary, value_errors
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure, axis_metric, named, pages
from flatbench.report.numbers import significant


def metric_against_flatness(results: Results, quantity: Quantity) -> Iterator[Figure]:
    """Test metric against one sharpness: a point a run, and a line within each method that has several
    configurations. No line goes over all methods: it would show what differs between them as a relation."""
    from matplotlib.ticker import MaxNLocator

    final = results.final
    final = final.assign(
        x=pd.to_numeric(final[quantity.column], errors="coerce").astype(float),
        error=value_errors(final, quantity.column),
    )
    usable = final.dropna(subset=["x", "test"])
    conditions = [c for c in results.conditions if (usable["condition"] == c).any()]
    looks = style.looks(results.methods)
    log = bool((usable["x"] > 0).all() and usable["x"].max() > 10 * usable["x"].min())
    many = len(usable) > _MANY

    def draw(axis: Any, condition: str, handles: dict[str, Any]) -> None:
        runs = usable[usable["condition"] == condition]
        shown = axis_metric(runs)
        for method, own in runs.groupby("method", sort=False):
            look = looks[str(method)]
            fit = _within_line(own, shown.scale, log)
            if fit is not None:
                axis.plot(*fit, color=look.colour, ls=look.line, lw=1.4, zorder=_ABOVE if many else None)
            if len(runs) <= _FEW and (own["error"] / own["x"].abs()).max() >= _SMALL:
                # not below a tenth of a value, which a logarithmic axis has no end of
                low = own["error"].clip(upper=0.9 * own["x"].abs()) if log else own["error"]
                axis.errorbar(
                    own["x"],
                    own["test"] * shown.scale,
                    xerr=[low, own["error"]],
                    fmt="none",
                    ecolor=look.colour,
                    elinewidth=0.6,
                    alpha=0.5,
                )
            (handles[str(method)],) = axis.plot(
                own["x"],
                own["test"] * shown.scale,
                look.marker,
                color=look.colour,
                alpha=0.75 if len(runs) <= _FEW else 0.5,
                ms=5 if len(runs) <= _FEW else 3,
                rasterized=many,
            )
        if log:
            style.log_scale(axis, runs["x"].min(), runs["x"].max())
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlabel(quantity.header)
        axis.set_ylabel(shown.header("Test"))

    name = f"metric_vs_{style.stem(quantity.column)}"
    lines = usable.groupby(["condition", "method"])["configuration"].nunique().ge(_LINE).any()
    for stem, figure, lacking in pages(results, conditions, name, draw):
        yield Figure(
            stem,
            f"Test metric against {lower_first(quantity.header)}: a point a run.{_errors_in_words(usable)}"
            + (" Least-squares lines within each method; none goes over all methods." if lines else "")
            + lacking,
            f"Scatter plot. {_means_in_words(usable, 'x', quantity.header)}",
            figure,
        )


def _errors_in_words(runs: pd.DataFrame) -> str:
    """How uncertain the values are; "" where that is not known."""
    shares = (runs["error"] / runs["x"].abs()).replace([np.inf, -np.inf], np.nan).dropna()
    if shares.empty or shares.max() < _SMALL:
        return ""
    text = f" Half of the values are uncertain by more than {significant(100 * shares.median(), 2)} %"
    return f"{text}, by the larger of their errors{_BARS if len(runs) <= _FEW else ''}."


_BARS = " (thin lines)"
#: an error of less than this share of its value is not seen in a figure
_SMALL = 0.01

#: configurations of a method from which on it has a line, and runs of a panel up to which points are large
_LINE, _FEW = 3, 60
#: points of a figure from which on they are dots of a picture in vector formats too, which would be megabytes
_MANY = 2000
#: where lines are drawn then: with none between them, all points of a panel are one picture
_ABOVE = 2.5


def _within_line(own: pd.DataFrame, scale: float, log: bool) -> tuple[Any, Any] | None:
    """A straight line over a method's runs of a condition, straight in log x on a logarithmic axis."""
    if own["configuration"].nunique() < _LINE or own["x"].nunique() < 2:
        return None
    x = own["x"].to_numpy()
    u = np.log(x) if log else x
    slope, start = np.polyfit(u, own["test"].to_numpy() * scale, 1)
    ends = np.array([u.min(), u.max()])
    return (np.exp(ends) if log else ends), start + slope * ends


def _means_in_words(runs: pd.DataFrame, column: str, name: str, limit: int = 12) -> str:
    """Each method's means, for those who do not see the figure."""
    parts = []
    for (condition, method), own in runs.groupby(["condition", "method"], sort=False):
        shown = axis_metric(own)
        where = named(method, condition)
        means = (own[column].mean(), own["test"].mean() * shown.scale)
        parts.append(f"{where}: {', '.join(significant(mean, 3) for mean in means)}")
    more = f"; and {len(parts) - limit} more" if len(parts) > limit else ""
    return f"Means of {lower_first(name)} and test metric: {'; '.join(parts[:limit])}{more}."


def metric_against_cost(results: Results) -> Iterator[Figure]:
    """Test metric against time per step, or operations where no time was measured; with a Pareto front."""
    quantity = main_cost(results) if timed(results) else _operations(results)
    column, header = quantity.column, quantity.header
    if column not in results.final:
        return
    usable = results.final.dropna(subset=[column, "test"])
    if usable.empty:
        return
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

    for stem, figure, lacking in pages(results, conditions, "metric_vs_cost", draw):
        yield Figure(
            stem,
            f"Test metric against {lower_first(header)}, mean ± standard deviation over seeds. The Pareto "
            f"front joins the methods that no other beats in both.{lacking}",
            f"Scatter plot with error bars. {_means_in_words(usable, column, header)}",
            figure,
        )


def _operations(results: Results) -> Quantity:
    """What is counted stands for times that were not measured."""
    column = results.column("gflops_per_example") or "-"
    return Quantity(column, "Matrix products per step and example (GFLOP)", "lower")


def pareto_front(cost: pd.Series[float], gain: pd.Series[float]) -> pd.Index[Any]:
    """Index of the points that no other point beats: less cost and at least as much gain, or the reverse."""
    beaten = [
        bool((((cost <= c) & (gain > g)) | ((cost < c) & (gain >= g))).any())
        for c, g in zip(cost, gain, strict=True)
    ]
    return cost.index[[not b for b in beaten]]
