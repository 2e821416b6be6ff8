"""The report's figures, each made from the results alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from flatbench.report.analysis.quantities import flatness, metric
from flatbench.report.analysis.results import Results
from flatbench.report.figures import courses, interference, relations, sensitivity, style
from flatbench.report.figures.curves import curves, draw_bands, spread
from flatbench.report.figures.forest import forest
from flatbench.report.figures.panels import Figure, chosen, named, pages
from flatbench.report.numbers import significant


def all_figures(results: Results) -> Iterator[Figure]:
    """Every figure that the results allow. Draw and save them inside `style.styled`."""
    if results.final.empty:
        return
    yield from forest(results)
    for quantity in flatness(results):
        yield from relations.metric_against_flatness(results, quantity)
    yield from relations.metric_against_cost(results)
    yield from sensitivity.sensitivity(results)
    yield from sensitivity.profile(results)
    yield from training_loss(results)
    yield from validation_metric(results)
    yield from courses.over_training(results)
    yield from courses.balancedness_by_layer(results)
    yield from interference.perturbations(results)
    yield from loss_slices(results)
    yield from courses.spectra(results)


def _representative_history(results: Results) -> pd.DataFrame:
    """The histories of each method's representative runs."""
    runs = set(results.representatives["run"])
    history = results.history
    return history[history["run"].isin(runs)] if "run" in history else pd.DataFrame()


def training_loss(results: Results) -> Iterator[Figure]:
    """Mean training loss of each epoch, mean and standard deviation over seeds."""
    history = _representative_history(results)
    if history.empty or "loss" not in history or not history["loss"].notna().any():
        return
    logged = history.dropna(subset=["loss"])
    epochs = logged.groupby(["condition", "method", "run", "epoch"], sort=False)["loss"].mean().reset_index()
    yield from curves(
        results,
        epochs.rename(columns={"loss": "y"}),
        "training_loss",
        lambda condition: "Training loss",
        "Training loss, averaged over the batches of each epoch",
    )


def validation_metric(results: Results) -> Iterator[Figure]:
    """Validation metric during training, mean and standard deviation over seeds."""
    history = _representative_history(results)
    final = results.representatives
    if history.empty:
        return
    metrics = dict(zip(final["run"], final["metric"], strict=True))
    rows = []
    for name in dict.fromkeys(metrics.values()):
        column = f"validation.{name}"
        if column in history:
            own = history[history["run"].map(metrics) == name].dropna(subset=[column])
            rows.append(own.assign(y=own[column] * metric(name).scale))
    during = pd.concat(rows) if rows else pd.DataFrame()
    if during.empty:
        return
    last = history.groupby("run")["epoch"].max()
    at_end = final.dropna(subset=["validation"])
    at_end = at_end.assign(
        epoch=at_end["run"].map(last),
        y=[v * metric(str(m)).scale for v, m in zip(at_end["validation"], at_end["metric"], strict=True)],
    )
    names = {c: metric(str(own["metric"].iloc[0])) for c, own in final.groupby("condition")}
    keep = ["condition", "method", "run", "epoch", "y"]
    yield from curves(
        results,
        pd.concat([during[keep], at_end[keep]]),
        "validation_metric",
        lambda condition: names[condition].header("Validation"),
        "Validation metric during training",
    )


def loss_slices(results: Results) -> Iterator[Figure]:
    """How the training loss rises along random directions: mean over seeds and directions, with their spread.

    From each run's own loss in the middle: of two curves on one another's scale the steeper is the sharper.
    """
    from matplotlib.ticker import MaxNLocator

    slices = results.slices
    if slices.empty:
        return
    slices = slices[slices["run"].isin(set(results.representatives["run"]))]
    for label, every in slices.groupby("label", sort=False):
        own = every.assign(loss=_rise(every))
        grouped = own.groupby(["condition", "method", "position"], sort=False)["loss"]
        bands = spread(grouped).rename(columns={"position": "x"})
        conditions = [c for c in results.conditions if (bands["condition"] == c).any()]
        axis_name = _distance_name(results, str(label))

        def draw(
            axis: Any,
            condition: str,
            handles: dict[str, Any],
            bands: pd.DataFrame = bands,
            axis_name: str = axis_name,
        ) -> None:
            draw_bands(axis, style.looks(results.methods), bands[bands["condition"] == condition], handles)
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))  # else labels touch
            axis.set_xlabel(axis_name)
            axis.set_ylabel("Rise of the training loss")

        for stem, figure, lacking in pages(results, conditions, f"slices_{style.stem(str(label))}", draw):
            yield Figure(
                stem,
                "Rise of the training loss along random directions, from the trained weights in the middle: "
                "mean "
                f"over seeds and directions, band of one standard deviation.{chosen(results)}{lacking}",
                f"Line plot. {_rises_in_words(bands)}",
                figure,
            )


def _rise(slices: pd.DataFrame) -> pd.Series[float]:
    """Each line's loss minus that at the trained weights, where the position is nearest to 0."""
    middle = slices.loc[slices["position"].abs().groupby([slices["run"], slices["direction"]]).idxmin()]
    known = middle.set_index(["run", "direction"])["loss"]
    place = pd.MultiIndex.from_frame(slices[["run", "direction"]])
    return pd.Series(slices["loss"].to_numpy() - known.reindex(place).to_numpy(), index=slices.index)


def _distance_name(results: Results, label: str) -> str:
    kind = results.content.get("measures", {}).get(label, {}).get("normalisation", "filter")
    return {
        "filter": "Distance (1 = norm of each filter's weights)",
        "layer": "Distance (1 = norm of each layer's weights)",
    }.get(kind, "Distance (l2 norm)")


def _rises_in_words(bands: pd.DataFrame) -> str:
    parts = []
    for (condition, method), own in bands.groupby(["condition", "method"], sort=False):
        where = named(method, condition)
        edge = own.loc[own["x"].abs() == own["x"].abs().max(), "mean"].mean()
        parts.append(f"{where} by {significant(edge, 3)}")
    return f"From the middle to the ends the loss rises: {'; '.join(parts[:12])}."
