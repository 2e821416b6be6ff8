"""Caveats to a report's numbers: missing, failed and skipped runs, values that did not converge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from flatbench.errors import shown
from flatbench.report.analysis.quantities import condition_words
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import summary
from flatbench.report.numbers import significant


def notes(results: Results) -> list[str]:
    """Every remark, a sentence each."""
    return [
        *_rebuild_note(results),
        *_damaged_runs(results),
        *_all_finished(results),
        *_missing_runs(results),
        *_data(results),
        *_tuning_failures(results),
        *_skip_reasons(results),
        *_measure_gaps(results),
        *_pairing_gaps(results),
        *_single_seed(results),
        *_edges(results),
        *_convergence(results),
    ]


def _rebuild_note(results: Results) -> Iterator[str]:
    if results.content.get("rebuilt"):
        yield (
            "study.json was missing: which runs belong to the study was read from their directories, all of "
            "which are taken for its own, in alphabetical order; `flatbench run` writes it anew."
        )
        yield from (f"Left out: {reason}." for reason in results.content.get("lost", ()))


def _method_text(method: object, condition: object, configuration: object = "") -> str:
    text = f"{method} ({condition_words(str(condition))})" if condition else str(method)
    return f"{text} [{configuration}]" if configuration else text


def _missing_runs(results: Results) -> Iterator[str]:
    for row in summary(results).to_dict("records"):
        name = _method_text(row["method"], row["condition"], "" if results.tuned else row["configuration"])
        if row["outstanding"]:
            yield f"{name}: not chosen yet, {row['outstanding']} tuning runs are outstanding."
        elif results.tuned and pd.isna(row["validation_score"]):
            yield f"{name}: no hyper-parameters could be chosen, every configuration failed on some seed."
        elif row["unfinished"]:
            yield f"{name}: {row['unfinished']} of {row['expected']} final runs are not finished."
        for state in ("diverged", "failed"):
            if row[state]:
                why = _reasons(results, row["run_ids"].split(), state)
                yield f"{name}: {row[state]} of {row['expected']} final runs {state}{why}."
        if row["undefined"]:
            yield f"{name}: the test metric of {row['undefined']} of {row['expected']} runs is undefined."


def _reasons(results: Results, runs: Sequence[str], state: str) -> str:
    """Which seeds did not end well, and of what: each reason with its seeds, most frequent first."""
    lost = results.final[results.final["run"].isin(runs) & (results.final["state"] == state)]
    found: dict[str, list[str]] = {}
    for seed, error in zip(lost["seed"], lost["error"], strict=True):
        text = "" if pd.isna(error) else " ".join(str(error).split())
        reason = shown(text.removeprefix("DivergedError: ").rstrip("."), _REASON)
        found.setdefault(reason, []).append(str(int(seed)))
    told = sorted(found.items(), key=lambda entry: -len(entry[1]))
    texts = [
        f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}{f': {reason}' if reason else ''}"
        for reason, seeds in told[:_REASONS]
    ]
    rest = ["and for other reasons"] if len(told) > _REASONS else []
    return f" ({'; '.join([*texts, *rest])})" if texts else ""


#: characters of a reason that are shown, and how many different reasons
_REASON, _REASONS = 120, 3


def _all_finished(results: Results) -> Iterator[str]:
    """Says that nothing was lost, so that whoever looks for what diverged need not infer it."""
    states = results.table["state"]
    if len(states) and (states == "done").all():
        yield f"All {len(states)} runs finished; none diverged or failed."


def _damaged_runs(results: Results) -> Iterator[str]:
    for row in results.table[results.table["state"] == "damaged"].to_dict("records"):
        name = _method_text(row["method"], row["condition"])
        what = f"run {row['run']} is damaged and left out ({row['error']})"
        yield f"{name}: {what}; `flatbench run` makes it anew."


def _data(results: Results) -> Iterator[str]:
    """What the tasks cut or left out, once a condition."""
    final = results.final
    if "data.notes" not in final:
        return
    for condition, texts in final.groupby("condition", sort=False)["data.notes"]:
        where = f"{condition_words(str(condition))}: " if condition else ""
        for note in dict.fromkeys(line for text in texts.dropna() for line in str(text).splitlines()):
            yield f"{where}{note}."


def _tuning_failures(results: Results) -> Iterator[str]:
    tuning = results.table[results.table["stage"] == "tune"]
    lost = tuning[tuning["state"].isin(["diverged", "failed"])]
    for (condition, method, state), runs in lost.groupby(["condition", "method", "state"], sort=False):
        total = ((tuning["condition"] == condition) & (tuning["method"] == method)).sum()
        yield (
            f"{_method_text(method, condition)}: {len(runs)} of {total} tuning runs {state}; "
            "their configurations could not be chosen."
        )


def _skip_reasons(results: Results) -> Iterator[str]:
    final = results.final
    for column in [c for c in final.columns if str(c).endswith(".skipped")]:
        for (method, reason), runs in final.groupby(["method", column], sort=False):
            count = f"{len(runs)} run" + ("s" if len(runs) > 1 else "")
            yield f"{column.removesuffix('.skipped')} was skipped for {method} ({count}): {reason}."


def _measure_gaps(results: Results) -> Iterator[str]:
    trained = results.final[results.final["test"].notna()]
    for label in results.content.get("measures", {}):
        own = [c for c in trained.columns if str(c).startswith(f"{label}.")]
        lacking = int(trained[own].isna().all(axis=1).sum()) if own else len(trained)
        if lacking:
            yield f"{label} is a measure of the study but was not taken on {lacking} of {len(trained)} runs."


def _pairing_gaps(results: Results) -> Iterator[str]:
    final = results.final
    for column in results.columns("paired_missing"):
        for (method, reason), runs in final.groupby(["method", column], sort=False):
            yield f"{method}: {len(runs)} of its runs not timed in turns with LoRA: {reason}."


def _single_seed(results: Results) -> Iterator[str]:
    if len(results.seeds) == 1:
        yield (
            "One seed: no spread is known, and no difference between methods can be distinguished from "
            "chance."
        )


def _edges(results: Results) -> Iterator[str]:
    """One remark a condition: with small grids nearly every choice is at an edge."""
    chosen = summary(results)
    for condition, rows in chosen[chosen["edges"] != ""].groupby("condition", sort=False):
        listed = ", ".join(
            f"{method} ({edges})" for method, edges in zip(rows["method"], rows["edges"], strict=True)
        )
        where = f"{condition_words(str(condition))}: " if condition else ""
        yield f"{where}chosen at the edge of the grid, so that a better value may lie outside: {listed}."


def _convergence(results: Results) -> Iterator[str]:
    final = results.final
    for column in results.columns("converged"):
        label = column.removesuffix(".converged")
        taken = final[column].dropna()
        loose = len(taken) - int(taken.astype(bool).sum())
        bounds = f"{label}.relative_error_bound_1"
        if loose and bounds in final:
            largest = float(pd.to_numeric(final[bounds], errors="coerce").max())
            yield (
                f"{label}: {loose} of {len(taken)} runs did not reach the tolerance; the largest relative "
                f"error bound is {significant(largest, 2)}."
            )
