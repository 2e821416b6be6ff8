"""Figures of what perturbations of A and B do to the merged weights while each method trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from flatbench.report.analysis import interference
from flatbench.report.analysis.quantities import condition_words
from flatbench.report.analysis.results import Results
from flatbench.report.figures import style
from flatbench.report.figures.curves import draw_bands, spread
from flatbench.report.figures.panels import Figure, chosen, missing, named
from flatbench.report.numbers import significant

_NAMES = {"share": "Norm / ρ", "cosine": "Cosine with G", "rise": "Loss rise at norm ρ"}
#: methods side by side
_COLUMNS = 4


def perturbations(results: Results) -> Iterator[Figure]:
    """Norm, cosine with the gradient of W, and rise of the loss at equal norm, over the epochs.

    A column of panels a method that trains, a line a perturbation, a figure a condition and label.
    """
    for label in interference.labels(results):
        points = interference.course(results, label)
        if points.empty or points["epoch"].nunique() < 2:
            continue  # no course
        for condition, own in points.groupby("condition", sort=False):
            methods = [name for name in results.methods if (own["method"] == name).any()]
            for start in range(0, len(methods), _COLUMNS):
                yield _figure(results, label, str(condition), own, methods, start)


def _figure(
    results: Results, label: str, condition: str, points: pd.DataFrame, methods: list[str], start: int
) -> Figure:
    shown = methods[start : start + _COLUMNS]
    figure, axes = style.panels(len(_NAMES) * len(shown), len(shown))
    figure.set_size_inches(max(style.COLUMN, style.PAGE * len(shown) / _COLUMNS), 6.4)
    looks = style.looks(list(interference.PERTURBATIONS))
    handles: dict[str, Any] = {}
    for place, (kind, header) in enumerate(_NAMES.items()):
        row = axes[place * len(shown) : (place + 1) * len(shown)]
        for axis, method in zip(row, shown, strict=True):
            own = points[points["method"] == method].dropna(subset=[kind])
            bands = spread(own.groupby(["perturbation", "epoch"], sort=False)[kind])
            draw_bands(axis, looks, bands.rename(columns={"epoch": "x"}), handles, by="perturbation")
            axis.set_xlabel("Epoch" if kind == "rise" else "")
            axis.set_ylabel(header if axis is row[0] else "")
            axis.set_title(style.plain(f"trained by {method}") if place == 0 else "")
            if axis is not row[0]:
                axis.sharey(row[0])
                axis.tick_params(labelleft=False)
        if kind == "share" and bool((points[kind] > 0).all()):
            row[0].set_yscale("log")
    style.wrap_labels(axes)
    words = {interference.PERTURBATIONS[name]: handles[name] for name in looks if name in handles}
    style.legend(figure, words, columns=1 if len(shown) < 3 else 2)
    stem = f"interference_{style.stem(label)}"
    stem += f"_{style.stem(condition)}" if condition else ""
    stem += f"_{start // _COLUMNS + 1}" if len(methods) > _COLUMNS else ""
    where = f" under {condition_words(condition)}" if condition and len(results.conditions) > 1 else ""
    lost = missing(results, results.conditions, methods)
    return Figure(
        stem,
        f"What perturbations of A and B do to the merged weights{where} ({label}): norm, cosine with the "
        "gradient G there, rise of the loss when scaled to the norm ρ. Mean over seeds, band of one standard "
        f"deviation.{chosen(results)}{lost}",
        f"Line plots. At the end the cosines with G are: {'; '.join(_ends(points, shown, condition)[:12])}.",
        figure,
    )


def _ends(points: pd.DataFrame, methods: list[str], condition: str) -> list[str]:
    """Of each method LoRA-SAM's cosine at the last epoch, Flat-LoRA's and EFlat-LoRA's."""
    last = points[points["epoch"] == points.groupby("run")["epoch"].transform("max")]
    means = last.groupby(["method", "perturbation"])["cosine"].mean().dropna()
    found = []
    for method in methods:
        own = [
            f"{interference.PERTURBATIONS[name]} {significant(means[method, name], 2)}"
            for name in ("sam", "flat_lora", "eflat_lora")
            if (method, name) in means.index
        ]
        found.append(f"{named(method, condition)} {', '.join(own)}")
    return found
