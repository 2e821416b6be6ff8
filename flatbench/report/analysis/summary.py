"""Final runs brought together: a row a condition, method and configuration, and what is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flatbench.report.analysis.quantities import flatness
from flatbench.report.analysis.results import Results
from flatbench.report.numbers import rounded
from flatbench.report.resolution import RISES

KEYS = ["condition", "method", "configuration"]
#: columns of `Results.final` that are averaged beside the measures' own
_SCORE_COLUMNS = [
    "test",
    "validation",
    "train",
    "gap",
    "loss_gap",
    "step_ms",
    "time_ratio",
    "total_time_ratio",
]
_COST = [
    "gradients_per_step",
    "gflops_per_example",
    "peak_memory_mb",
    "trainable_parameters",
    "train_seconds",
    "energy_joules",
    "paired_ratio",
]


@lru_cache(maxsize=2)
def summary(results: Results) -> pd.DataFrame:
    """A row a condition, method and configuration of the final runs, in the study's order.

    Columns: ``condition``, ``method``, ``configuration``, ``metric``, ``run_ids``; ``runs`` (with a test
    metric), ``expected``, ``diverged``, ``failed``, ``unfinished``, ``undefined`` (trained, but the test
    metric has no value); ``tried``, ``tuning_seeds``, ``validation_score`` (tuning) and ``edges`` (see
    `edges`); and for every averaged column c: ``c_mean``, ``c_std`` (n − 1 in the denominator; NaN for one
    run), ``c_n``; the largest ``…relative_error_bound_1_max`` of every eigenvalue, the largest sampling error
    ``c_sampling_error_max`` of every sharpness, relative to its value; ``…converged_n``, ``…certified_n``
    and ``…resolved_not_n``; ``c_below_n``, ``c_rounding_error_max`` and ``c_rounding_share_max`` of
    every rise.
    """
    final = results.final
    costs = [c for value in _COST if (c := results.column(value))]
    measured = flatness(results)
    columns = [*_SCORE_COLUMNS, *[q.column for q in measured], *costs]
    averaged = averages(final, columns, ["mean", "std", "count"]).to_dict("index")
    bounds = results.columns("relative_error_bound_1")
    kept = [*results.columns("converged"), *results.columns("certified")]
    resolutions = results.columns("resolved")  # empty where no interval was asked for
    cells = _Cells(final)
    rows = []
    for key, at in _groups(results, final):
        row: dict[str, Any] = dict(zip(KEYS, key, strict=True))
        named = [name for name in cells.objects("metric")[at] if not pd.isna(name)]
        row["metric"] = named[0] if named else _metric_of(results, key[0])
        row["run_ids"] = " ".join(cells.objects("run")[at])
        row |= _counts(results, cells, at) | _tuning_counts(results, key[0], key[1])
        own = averaged.get(key, {})
        for column in columns:
            row[f"{column}_mean"] = own.get((column, "mean"), math.nan)
            row[f"{column}_std"] = own.get((column, "std"), math.nan)
            row[f"{column}_n"] = int(own.get((column, "count"), 0))
        for bound in bounds:
            row[f"{bound}_max"] = _largest(cells.numbers(bound)[at])
        for quantity in measured:
            errors = sampling_error_column(quantity.column)
            if errors is not None and errors in final:
                row[f"{quantity.column}_sampling_error_max"] = _largest_share(
                    cells, at, errors, quantity.column
                )
        for quantity in measured:
            row |= _rounding(cells, at, quantity.column)
        for held in kept:
            row[f"{held}_n"] = int(cells.true(held)[at].sum())
        for resolved in resolutions:
            row[f"{resolved}_not_n"] = int((cells.known(resolved) & ~cells.true(resolved))[at].sum())
        rows.append(row)
    return pd.DataFrame(rows)


class _Cells:
    """The columns of the final runs as arrays, each made once: thousands of groups are taken from them."""

    def __init__(self, final: pd.DataFrame) -> None:
        self.final = final
        self._made: dict[tuple[str, str], NDArray[Any]] = {}

    def objects(self, column: str) -> NDArray[Any]:
        return self._once("objects", column, lambda cells: cells.to_numpy(dtype=object))

    def numbers(self, column: str) -> NDArray[np.float64]:
        """Numbers, NaN for everything else."""
        return self._once(
            "numbers", column, lambda cells: pd.to_numeric(cells, errors="coerce").to_numpy(dtype=float)
        )

    def known(self, column: str) -> NDArray[np.bool_]:
        return self._once("known", column, lambda cells: cells.notna().to_numpy(dtype=bool))

    def true(self, column: str) -> NDArray[np.bool_]:
        """Where a flag is known and set."""
        return self._once(
            "true", column, lambda cells: cells.map(lambda v: not pd.isna(v) and bool(v)).to_numpy(dtype=bool)
        )

    def _once(self, kind: str, column: str, make: Callable[[pd.Series[Any]], NDArray[Any]]) -> NDArray[Any]:
        if (kind, column) not in self._made:
            self._made[kind, column] = make(self.final[column])
        return self._made[kind, column]


def _rounding(cells: _Cells, at: NDArray[np.intp], column: str) -> dict[str, Any]:
    """Of a rise's values: how many rounding hides, and the largest error by it; nothing of other columns."""
    label, _, value = column.partition(".")
    hidden, errors = f"{label}.below_resolution", f"{label}.rounding_error"
    if value not in RISES or hidden not in cells.final or errors not in cells.final:
        return {}
    known = at[cells.known(column)[at]]
    return {
        f"{column}_below_n": int(cells.true(hidden)[known].sum()),
        f"{column}_rounding_error_max": _largest(cells.numbers(errors)[known]),
        f"{column}_rounding_share_max": _largest_share(cells, at, errors, column),
    }


def sampling_error_column(column: str) -> str | None:
    """The column of what the choice of examples does to a sharpness, eigenvalue or trace; None of others."""
    label, _, value = column.partition(".")
    names = {
        "eigenvalue_1": "sampling_error_1",
        "trace": "trace_sampling_error",
        "sharpness": "sampling_error",
    }
    return f"{label}.{names[value]}" if value in names else None


def value_errors(runs: pd.DataFrame, column: str) -> pd.Series[float]:
    """Of each run's value the larger of its known errors, in the value's unit: what the choice of examples
    makes, what the search left open, what rounding hides. NaN where none is known."""
    label, _, value = column.partition(".")
    size = pd.to_numeric(runs[column], errors="coerce").abs()
    found = []
    for name, scale in (
        (sampling_error_column(column), 1.0),
        (f"{label}.relative_error_bound_1" if value == "eigenvalue_1" else None, size),
        (f"{label}.rounding_error" if value in RISES else None, 1.0),
    ):
        if name is not None and name in runs:
            found.append(pd.to_numeric(runs[name], errors="coerce").astype(float) * scale)
    if not found:
        return pd.Series(math.nan, index=runs.index)
    return pd.concat(found, axis=1).max(axis=1)


def _largest(values: NDArray[np.float64]) -> float:
    """The largest number; NaN where there is none."""
    numbers = values[~np.isnan(values)]
    return float(numbers.max()) if len(numbers) else math.nan


def _largest_share(cells: _Cells, at: NDArray[np.intp], errors: str, values: str) -> float:
    """The largest error relative to its value; infinite where one is not known."""
    known = at[cells.known(values)[at]]
    if not len(known):
        return math.nan
    error = cells.numbers(errors)[known]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(np.isnan(error), math.inf, error) / np.abs(cells.numbers(values)[known])
    return float(np.where(np.isnan(share), 0.0, share).max())


def averages(final: pd.DataFrame, columns: Sequence[str], statistics: Sequence[str]) -> pd.DataFrame:
    """Statistics of columns by condition, method and configuration, under (column, statistic)."""
    numbers = {c: pd.to_numeric(final[c], errors="coerce").astype(float) for c in columns}
    values = pd.DataFrame(numbers, index=final.index)
    keys = [final[key] for key in KEYS]
    found = values.groupby(keys, sort=False).agg(list(statistics))
    sizes = values.abs().groupby(keys, sort=False).max()
    for column in columns:  # equal values have no spread, whatever rounding made of their mean
        for statistic in set(statistics) - {"count"}:
            pairs = zip(found[(column, statistic)], sizes[column], strict=True)
            found[(column, statistic)] = [rounded(value, size) for value, size in pairs]
    return found


def _groups(results: Results, final: pd.DataFrame) -> Iterator[tuple[tuple[str, str, str], NDArray[np.intp]]]:
    """Every condition and method, those without final runs included: the places of its runs."""
    grouped: dict[tuple[str, str], dict[Any, list[int]]] = {}
    for place, key in enumerate(zip(*(final[name] for name in KEYS), strict=True)):
        if not any(pd.isna(part) for part in key):
            grouped.setdefault(key[:2], {}).setdefault(key, []).append(place)
    for condition in results.conditions:
        for method in results.methods:
            nothing: dict[Any, list[int]] = {(condition, method, ""): []}
            for key, places in grouped.get((condition, method), nothing).items():
                yield key, np.array(places, dtype=np.intp)


def _metric_of(results: Results, condition: str) -> str | None:
    """The main metric where there are no final runs: that of the tuning runs."""
    found = results.table.loc[results.table["condition"] == condition, "metric"].dropna()
    return None if found.empty else str(found.iloc[0])


def _counts(results: Results, cells: _Cells, at: NDArray[np.intp]) -> dict[str, int]:
    states = Counter(cells.objects("state")[at])
    has_test = cells.known("test")[at]
    trained = np.isin(cells.objects("state")[at], ["done", "trained"]) | (
        cells.known("test.loss")[at] if "test.loss" in cells.final else True
    )
    # with a grid of final configurations each has its own row, so a row always stands for the final seeds
    return {
        "runs": int(has_test.sum()),
        "expected": max(len(results.seeds), len(at)),
        "diverged": states["diverged"],
        "failed": states["failed"],
        "unfinished": max(len(results.seeds) - len(at), 0) + states["planned"] + states["interrupted"],
        "undefined": int((trained & ~has_test).sum()),
    }


def _tuning_counts(results: Results, condition: str, method: str) -> dict[str, Any]:
    budget = results.content["budget"][method]
    trials = [e for e in results.selection if (e["condition"], e["method"]) == (condition, method)]
    chosen = next((e for e in trials if e["chosen"]), None)
    return {
        "tried": budget["trials"],
        "tuning_seeds": len(budget["tuning_seeds"]),
        "validation_score": None if chosen is None else chosen["score"],
        "edges": "; ".join(edges(chosen["choice"], [e["choice"] for e in trials])) if chosen else "",
        "outstanding": sum(e["outstanding"] for e in trials),
    }


def edges(choice: Mapping[str, Any], tried: list[Mapping[str, Any]]) -> list[str]:
    """Which hyper-parameters of a choice are the smallest or largest that were tried: a better one may lie
    outside. Only numbers of which several were tried have an edge."""
    found = []
    for name, value in choice.items():
        values = sorted({c[name] for c in tried if name in c and _is_number(c[name])})
        if len(values) > 1 and _is_number(value):
            if value == values[0]:
                found.append(f"smallest {name}")
            elif value == values[-1]:
                found.append(f"largest {name}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
