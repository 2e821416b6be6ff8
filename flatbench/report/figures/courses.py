"""Figures of what changes during training beside the loss, and of whole spectra."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pandas as pd

from flatbench.report.analysis.quantities import Quantity, tracked
from flatbench.report.analysis.results import Results
from flatbench.report.figures import style
from flatbench.report.figures.curves import curves, draw_bands
from flatbench.report.figures.panels import Figure, chosen, named, pages
from flatbench.report.numbers import significant


def over_training(results: Results) -> Iterator[Figure]:
    """Sharpness and balancedness of each method's representative runs over the epochs."""
    history = results.history
    if history.empty:
        return
    history = history[history["run"].isin(set(results.representatives["run"]))]
    for quantity in tracked(results):
        yield from _course(results, history, quantity)


def _course(results: Results, history: pd.DataFrame, quantity: Quantity) -> Iterator[Figure]:
    points = history.assign(y=pd.to_numeric(history[quantity.column], errors="coerce")).dropna(subset=["y"])
    if points["epoch"].nunique() < 2:
        return  # no course
    stem = "over_training_" + style.stem(quantity.column)
    yield from curves(
        results,
        points[["condition", "method", "run", "epoch", "y"]],
        stem,
        lambda condition: quantity.header,
        f"{quantity.header} during training",
        log=quantity.better == "lower" and bool((points["y"] > 0).all()),
    )


def balancedness_by_layer(results: Results) -> Iterator[Figure]:
    """Balancedness of every layer over the epochs, a thin line a layer: mean over seeds."""
    measured = results.content.get("measures", {})
    columns = [
        c
        for c in map(str, results.history.columns)
        if re.search(r"\.layer_\d+$", c) and c.partition(".")[0] in measured
    ]
    if results.history.empty or not columns:
        return
    history = results.history[results.history["run"].isin(set(results.representatives["run"]))]
    points = history.melt(["condition", "method", "epoch"], columns, "layer", "y").dropna(subset=["y"])
    if points["epoch"].nunique() < 2:
        return
    means = points.groupby(["condition", "method", "layer", "epoch"], sort=False)["y"].mean().reset_index()
    looks = style.looks(results.methods)

    def draw(axis: Any, condition: str, handles: dict[str, Any]) -> None:
        own = means[means["condition"] == condition].sort_values("epoch")
        for method in results.methods:
            for layer in columns:
                line = own[(own["method"] == method) & (own["layer"] == layer)]
                if len(line):
                    look = looks[method]
                    drawn = axis.plot(line["epoch"], line["y"], color=look.colour, ls=look.line, lw=0.8)
                    handles[method] = drawn[0]
        axis.set_xlabel("Epoch")
        axis.set_ylabel("Balancedness ‖B‖² − ‖A‖²")

    conditions = [c for c in results.conditions if (means["condition"] == c).any()]
    ends = means.sort_values("epoch").drop_duplicates(["condition", "method", "layer"], keep="last")
    words = [
        f"{named(method, condition)} {significant(y.min(), 3)} and {significant(y.max(), 3)}"
        for (condition, method), y in ends.groupby(["condition", "method"], sort=False)["y"]
    ]
    for stem, figure, lacking in pages(results, conditions, "over_training_balancedness_by_layer", draw):
        yield Figure(
            stem,
            "Balancedness of each adapted layer during training, a line a layer: mean over seeds."
            f"{chosen(results)}{lacking}",
            f"Line plot. At the end the layers lie between: {', '.join(words[:12])}.",
            figure,
        )


def spectra(results: Results) -> Iterator[Figure]:
    """The Hessian's spectral density of one seed's runs, with its band, all methods on one axis."""
    found = results.spectra
    if found.empty:
        return
    found = found[found["run"].isin(set(results.representatives["run"]))]
    for label, own in found.groupby("label", sort=False):
        seed = own["seed"].iloc[0]
        shown = own[own["seed"] == seed].rename(columns={"eigenvalue": "x", "density": "mean"})
        conditions = [c for c in results.conditions if (shown["condition"] == c).any()]
        floor = 1e-6 * float(shown["mean"].max())

        def draw(
            axis: Any,
            condition: str,
            handles: dict[str, Any],
            shown: pd.DataFrame = shown,
            floor: float = floor,
        ) -> None:
            draw_bands(axis, style.looks(results.methods), shown[shown["condition"] == condition], handles)
            axis.set_xscale("symlog", linthresh=_near_zero(shown))
            axis.set_yscale("log")
            axis.set_ylim(bottom=floor)
            axis.set_xlabel("Eigenvalue")
            axis.set_ylabel("Density (share of eigenvalues per unit)")

        words = [
            f"{named(method, condition)} up to {significant(rows['x'].max(), 3)}"
            for (condition, method), rows in shown.groupby(["condition", "method"], sort=False)
        ]
        for stem, figure, lacking in pages(results, conditions, f"spectrum_{style.stem(str(label))}", draw):
            yield Figure(
                stem,
                f"Spectral density of the Hessian, smoothed, of the runs with seed {seed}: stochastic "
                f"Lanczos quadrature with its 95 % band.{chosen(results)}{lacking}",
                f"Line plot on logarithmic axes. Eigenvalues reach: {'; '.join(words[:12])}.",
                figure,
            )


def _near_zero(shown: pd.DataFrame) -> float:
    """Within it the axis is linear: a power of ten above the smoothing, which resolves nothing finer."""
    return float(10.0 ** math.ceil(math.log10(shown["width"].max())))
