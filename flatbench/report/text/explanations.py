"""Explain below each table how its numbers were computed."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from flatbench.report.analysis.correlation import FEWEST_WITHIN
from flatbench.report.analysis.differences import differences
from flatbench.report.analysis.quantities import MOST_WAITING, timed, timing
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import MIN_CLUSTERS
from flatbench.report.analysis.summary import summary
from flatbench.report.numbers import significant


def explanations(results: Results) -> dict[str, str]:
    """A paragraph by a table's name; empty where nothing needs saying."""
    return {
        "results": _results(results),
        "comparisons": _comparisons(results),
        "aggregates": "Point estimates; with few seeds a bootstrap interval would not cover what it says.",
        "correlations": (
            "Only runs under the same condition are compared. The levels of Kendall's τ, the fairest "
            "first: runs "
            "that differ in one hyper-parameter alone (granulated, Jiang et al. 2019), runs of one method, "
            "runs "
            "at one learning rate, all runs. Intervals leave out one configuration at a time, then one "
            "method "
            "at a time (jackknife on Fisher's scale), and are the wider of the two; a configuration under "
            "several "
            f"conditions is one. They are given from {MIN_CLUSTERS} configurations up, within several "
            "methods "
            f"from {FEWEST_WITHIN}; in simulations they cover 92 to 100 % at a nominal 95 % "
            "(benchmarks/results/inference.json). A correlation is no proof of a cause."
        ),
        "published": (
            "Published figures are those of other models and data where the last column says so: compare "
            "differences between methods, not levels. Averages weigh every task alike."
        ),
        "interference": (
            "Averages within each run over the epochs after which it was taken, or of the trained model, "
            "then mean and standard deviation over seeds. W moves by s·B·E_A + s·E_B·A + s·E_B·E_A when A "
            "and B move by E_A and E_B. G is the gradient of the loss of the merged weights; rises are of "
            "perturbations scaled to the same norm, so that they compare directions: along G the rise is to "
            "first order the largest that there is."
        ),
        "cost": " ".join(_cost(results)),
    }


def _cost(results: Results) -> Iterator[str]:
    if results.columns("step_ms") and not timed(results):
        yield (
            "No times are shown: these runs were not timed in turns with plain LoRA (`cost: paired`), nor "
            "are "
            f"they known to have waited for a core in at most {100 * MOST_WAITING:g} % of the time that "
            f"they had "
            "work; such a time says as much about what else the machine did. cost.csv has them."
        )
    if timing(results) == "alone":
        column = results.column("core_wait_share")
        most = 100 * float(results.final[column].astype(float).max()) if column else 0.0
        yield (
            f"Times are of training itself: no run waited for a core in more than {significant(most, 2)} % "
            f"of the "
            "time in which it had work, as the system's scheduler records it."
        )
    if timed(results):
        yield f"Relative times are means of ratios to the run of {results.baseline} with the same seed."
    if timing(results) == "paired":
        yield (
            "Paired times are of blocks of steps of the method and of plain LoRA in turns, on one machine, "
            "after training and apart from it: the median of the ratios of neighbouring blocks."
        )
    column = results.column("energy_joules")
    if column is not None and timed(results):
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
            "The best mean of a column is bold, the second in italics, among methods that have every run; of "
            "positive eigenvalues and traces the best geometric mean, by which they are compared."
        )
    else:
        lines.append(
            "Nothing is marked as best: every configuration of the grid is shown, and picking one of them by "
            "its test metric would be choosing on the test split."
        )
    if results.tuned:
        lines.append(
            "Hyper-parameters were chosen on validation data with seeds of their own; every method tried the "
            "same number of configurations, of equal scores the grid's first was taken, and the test split "
            "was read by final runs only."
        )
    if results.columns("eigenvalue_1"):
        lines.append(_what_bounds_say(results))
    return " ".join(lines)


def _what_bounds_say(results: Results) -> str:
    """Of eigenvalues: whether each was proved to be the wanted one, or only that some eigenvalue is there."""
    bound = "the error bound (relative, the largest over runs) of the value given"
    final = results.final
    proved = []
    for column in results.columns("eigenvalue_1"):
        own = f"{column.partition('.')[0]}.certified"
        measured = final[final[column].notna()]
        proved.append(own in final and bool(measured[own].eq(True).all()))
    if all(proved):
        return f"The eigenvalue that is named lies within {bound}, with a probability of 99 % a run."
    return f"Some eigenvalue lies within {bound}; this does not prove that it is the one that is named."


def _comparisons(results: Results) -> str:
    data = differences(results)
    family = int(data["family"].iloc[0]) if len(data) else 0
    lines = [
        "Runs with one seed share data order, label noise and start, so they are paired. Intervals and p "
        "values "
        f"are two readings of one test, simultaneous over the {family} main comparisons (test metric and the "
        "primary flatness measure; Bonferroni); the spread is the larger of a comparison's own and that of "
        "all "
        "of the table. Exact p: all sign flips, where there are seeds enough. Eigenvalues and traces are "
        "compared as ratios."
    ]
    if not results.tuned and not _one_row_per_method(results):
        lines.append("A method stands for the mean over its whole grid, as nothing was selected.")
    if len(results.conditions) > 1:
        lines.append("Over all conditions, the mean of a seed's differences is one value.")
    return " ".join(lines)
