"""Published figures for the same tasks and methods beside our own, with the differences in set-up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import pandas as pd
from pydantic import Field

from flatbench.config import study_files
from flatbench.config.registry import Options
from flatbench.config.validation import validated
from flatbench.config.yaml import parse, read_text
from flatbench.errors import InputError
from flatbench.report.analysis.differences import ALL
from flatbench.report.analysis.quantities import metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import averages
from flatbench.report.numbers import fixed
from flatbench.report.tables.averages import Part, Table
from flatbench.report.tables.cells import ABSENT, Cell, number


class PublishedRow(Options):
    """Figures of several methods on one task.

    Attributes:
        task: the task's name and those of its options that the figures belong to.
        over: values of the task's option ``task`` that the figures are the average over.
        metric: the study's main metric, or ``average`` of the main metrics of several tasks.
        test_sets: value of the task's option ``task`` -> the test set that its figures are on, where that is
            not ``test`` (MNLI's ``test_mismatched``).
        values: method -> figure, as printed.
    """

    task: Annotated[dict[str, Any], Field(min_length=1)]
    over: list[str] = []
    metric: str
    test_sets: dict[str, str] = {}
    values: Annotated[dict[str, float], Field(min_length=1)]


class PublishedTable(Options):
    """Rows that share a set-up: what it was called (model, training examples, r, …) and what it was."""

    setup: dict[str, Any]
    rows: Annotated[list[PublishedRow], Field(min_length=1)]


class Publication(Options):
    """A file of ``studies/published``: a source and its tables."""

    source: str
    tables: Annotated[list[PublishedTable], Field(min_length=1)]


def load_publications(files: Sequence[Path] = ()) -> list[Publication]:
    """Read publications: those that come with flatbench, or other files of their form.

    Raises InputError for a file that is not there or not valid.
    """
    found = []
    for path in files or sorted((study_files.folder() / "published").glob("*.yaml")):
        try:
            content = parse(read_text(path))
        except (ValueError, OSError) as error:
            raise InputError(f"{path}: not readable as plain YAML: {error}") from None
        found.append(validated(Publication, content, str(path)))
    return found


def published_table(results: Results, publications: Sequence[Publication]) -> Table | None:
    """Every published figure of a task and method that the results have too; None if there is none.

    Raises InputError for results whose study.json does not yet say what their tasks are.
    """
    if "tasks" not in results.content:
        raise InputError(
            f"{results.name}: its results do not say what its tasks were; `flatbench run` on the finished "
            "study adds it, without training anything again"
        )
    rows = [
        row
        for publication in publications
        for table in publication.tables
        for entry in table.rows
        for row in _matches(results, publication.source, table.setup, entry)
    ]
    if not rows:
        return None
    data = pd.DataFrame(rows)
    shown: dict[str, list[Cell]] = {}
    if len(results.conditions) > 1:
        shown["Condition"] = [Cell(text) for text in data["condition"]]
    shown |= {
        "Method": [Cell(text) for text in data["method"]],
        "Metric": [Cell(text) for text in data["shown_metric"]],
        "Here": [_own_cell(row) for row in rows],
        "Published": [Cell(f"{v:g}", value=v) for v in data["published"]],
        "Here − published": [
            Cell(ABSENT) if math.isnan(d) else Cell(fixed(d, 1, sign=True), value=d)
            for d in data["difference"]
        ],
        "Source": [Cell(text) for text in data["source"]],
        "Set-up there, and here": [Cell(text) for text in data["setup"]],
    }
    return Table("published", "Beside published figures", data, [Part(results.name, pd.DataFrame(shown))])


def _own_cell(row: Mapping[str, Any]) -> Cell:
    if math.isnan(row["mean"]):
        return Cell(ABSENT, remark="not run yet")
    text, spread = number(row["mean"], row["std"], 1)
    return Cell(text, spread, "one run" if row["n"] == 1 else "", value=row["mean"])


def _matches(
    results: Results, source: str, setup: Mapping[str, Any], entry: PublishedRow
) -> Iterator[dict[str, Any]]:
    tasks = results.content.get("tasks", {})
    if not tasks:
        return  # made by an early version, which does not say what was trained on
    fitting = [c for c in results.conditions if entry.task.items() <= tasks[c].items()]
    if entry.over:
        names = [tasks[c].get("task") for c in fitting]
        if sorted(map(str, names)) != sorted(entry.over):
            return  # an average over other tasks is another number
        groups = [(ALL, fitting)]
    else:
        groups = [(condition, [condition]) for condition in fitting]
    for label, conditions in groups:
        for method, figure in entry.values.items():
            if method in results.methods:
                sets = {c: entry.test_sets.get(str(tasks[c].get("task")), "test") for c in conditions}
                ours = _score(results, sets, method, None if entry.over else entry.metric)
                if ours is not None:
                    yield {
                        "condition": label,
                        "method": method,
                        "metric": entry.metric,
                        **ours,
                        "published": figure,
                        "difference": ours["mean"] - figure,
                        "source": source,
                        "setup": _differences(results, conditions[0], setup),
                    }


def _score(
    results: Results, sets: Mapping[str, str], method: str, wanted: str | None
) -> dict[str, Any] | None:
    """Mean and spread of our metric in the unit in which it is shown; None for another metric.

    Args:
        sets: condition -> its test set.
    """
    conditions = list(sets)
    runs = results.representatives
    runs = runs[runs["condition"].isin(conditions) & (runs["method"] == method)]
    names = set(runs["metric"].dropna())
    if wanted is not None and names != {wanted}:
        return None
    shown = metric(wanted) if wanted else None
    scaled = runs.assign(test=[_value(row, sets) for row in runs.to_dict("records")])
    other = sorted({name for name in sets.values() if name != "test"})
    header = shown.header("Test") if shown else "Average of the test metrics"
    if other and len(sets) == 1:
        both = [row["test"] * metric(str(row["metric"])).scale for row in runs.to_dict("records")]
        header += f" on {other[0]}" + (f" (on test {fixed(mean(both), 1)})" if both else "")
    elif other:
        header += f" ({', '.join(f'{c} on {name}' for c, name in sets.items() if name != 'test')})"
    found = averages(scaled, ["test"], ["mean", "std", "count"])["test"] if len(scaled) else None
    whole = found is not None and len(found) == len(conditions) and bool(found["mean"].notna().all())
    return {
        "shown_metric": header,
        "mean": float(found["mean"].mean()) if found is not None and whole else math.nan,
        # of several tasks' means the seeds' spread is no standard deviation of one number
        "std": float(found["std"].iloc[0])
        if found is not None and whole and len(conditions) == 1
        else math.nan,
        "n": int(found["count"].min()) if found is not None and whole else 0,
    }


def _value(run: Mapping[Any, Any], sets: Mapping[str, str]) -> float:
    """A run's main metric on the test set of its condition, in the unit in which it is shown."""
    name, which = str(run["metric"]), sets[run["condition"]]
    value = run["test"] if which == "test" else run.get(f"{which}.{name}", math.nan)
    return float(value) * metric(name).scale


def our_setup(results: Results, condition: str) -> dict[str, Any]:
    """Our set-up under the names that ``setup`` uses; what the study does not say is left out."""
    study, task = results.content["study"], results.content.get("tasks", {}).get(condition, {})
    adapter = study.get("adapter")
    adapter = adapter if isinstance(adapter, Mapping) else {}
    shots, train = task.get("shots"), study.get("train", {})
    found = {
        "model": results.content.get("models", {}).get(condition, {}).get("name_or_path"),
        "training examples": f"{shots} a class" if shots else task.get("train_examples") or "all",
        "r": adapter.get("r"),
        "alpha": adapter.get("alpha"),
        "target modules": ", ".join(adapter.get("target_modules") or []) or None,
        "epochs": None if train.get("steps") else train.get("epochs"),
        "steps": train.get("steps"),
        "seeds": len(results.seeds),
    }
    return {key: value for key, value in found.items() if value is not None}


def _differences(results: Results, condition: str, setup: Mapping[str, Any]) -> str:
    ours = our_setup(results, condition)
    texts = []
    for key, there in setup.items():
        here = ours.get(key)
        same = str(here) == str(there)
        texts.append(f"{key} {there}" + ("" if same else f" (here {'not named' if here is None else here})"))
    return "; ".join(texts)
