"""Explain below each table how its numbers were computed."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import MIN_CLUSTERS
from flatbench.report.analysis.summary import summary


def explanations(results: Results) -> dict[str, str]:
    """A paragraph by a table's name; empty where nothing needs saying."""
    return {
        "results": _results(results),
        "comparisons": _comparisons(results),
        "aggregates": "Point estimates; with few seeds a bootstrap interval would not cover what it says.",
        "correlations": (
            "Only runs under the same condition are compared. The granulated coefficient compares runs that "
            "differ in one hyper-parameter alone (Jiang et al. 2019). Intervals leave out one configuration "
            f"at a time (jackknife on Fisher's scale) and are given from {MIN_CLUSTERS} configurations up: "
            "in simulations they cover 95 to 98 % at a nominal 95 %, that of the granulated coefficient 97 "
            "to 99.5 %, so it is wider than necessary. A correlation is no proof of a cause."
        ),
        "published": (
            "Published figures are those of other models and data where the last column says so: compare "
            "differences between methods, not levels. Averages weigh every task alike."
        ),
        "cost": " ".join(_cost(results)),
    }


def _cost(results: Results) -> Iterator[str]:
    if results.final["time_ratio"].notna().any():
        yield f"Relative times are means of ratios to the run of {results.baseline} with the same seed."
    paired = results.column("paired_ratio")
    if paired is not None and results.final[paired].notna().any():
        yield (
            "Paired times are of blocks of steps of the method and of plain LoRA in turns, on one machine, "
            "after training and apart from it: the median of the ratios of neighbouring blocks."
        )
    column = results.column("energy_joules")
    if column is not None:
        yield from _energy(results, column.partition(".")[0])
    if results.columns("gflops_per_example"):
        yield (
            "Matrix products are counted, not timed: forward and backward passes for all gradients of a "
            "step, on the trained model, so that a second adapter that Bi-LoRA drops is not among them."
        )


def _energy(results: Results, label: str) -> Iterator[str]:
    final = results.final
    sources = [*map(str, final.get(f"{label}.energy_source", pd.Series(dtype=str)).dropna().unique())]
    if final[f"{label}.energy_joules"].notna().any():
        beside = pd.to_numeric(final.get(f"{label}.jobs", pd.Series(dtype=float)), errors="coerce").max()
        yield (
            f"Energy is that of training without evaluation, as read from counters ({'; '.join(sources)}), "
            "and includes whatever else ran on the same devices"
            + (f": up to {beside:.0f} runs of this study at once." if beside > 1 else ".")
        )
    reasons = final.get(f"{label}.energy_missing", pd.Series(dtype=str)).dropna().value_counts()
    for reason, count in reasons.items():
        yield f"Energy is unknown for {count} of {len(final)} runs: {reason}."


def _one_row_per_method(results: Results) -> bool:
    return not summary(results).duplicated(["condition", "method"]).any()


def _results(results: Results) -> str:
    lines = ["Mean ± standard deviation (n − 1) over the final seeds."]
    if _one_row_per_method(results):
        lines.append(
            "The best mean of a column is bold, the second in italics, among methods that have every run."
        )
    else:
        lines.append(
            "Nothing is marked as best: every configuration of the grid is shown, and picking one of them by "
            "its test metric would be choosing on the test split."
        )
    if results.tuned:
        lines.append(
            "Hyper-parameters were chosen on validation data with seeds of their own; every method tried the "
            "same number of configurations, and the test split was read by final runs only."
        )
    if results.columns("eigenvalue_1"):
        lines.append(
            "Some eigenvalue of the Hessian lies within the error bound (relative, the largest "
            "over runs) of the value given; this does not prove that it is the largest."
        )
    return " ".join(lines)


def _comparisons(results: Results) -> str:
    lines = [
        "Runs with one seed share data order, label noise and start, so they are paired. Intervals are "
        "Student's t of the differences; p values come from all sign flips of the differences, and Holm's "
        f"correction is over the methods compared with {results.baseline}."
    ]
    if not results.tuned and not _one_row_per_method(results):
        lines.append("Each method is represented by the configuration with the best mean validation metric.")
    if len(results.conditions) > 1:
        lines.append("Over all conditions, differences under different conditions count as independent.")
    return " ".join(lines)
