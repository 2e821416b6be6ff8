"""Statements made from the analysis; `flatbench.report.text.sentences` makes their texts.

A report says nothing about methods or relations that is not one of them; ``findings.json`` holds them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from flatbench.report.analysis.differences import (
    ALL,
    compared,
    difference_scale,
    differences,
    method_values,
    on_log_scale,
    primary_flatness,
)
from flatbench.report.analysis.quantities import Quantity, main_cost, metric, timed, timing
from flatbench.report.analysis.relations import Relation, relations
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.summary import summary
from flatbench.report.numbers import rounded
from flatbench.report.text.statement import Statement


def known(value: float) -> float | None:
    """A number as JSON has it: None for what is unknown or infinite."""
    return float(value) if math.isfinite(value) else None


@lru_cache(maxsize=2)
def statements(results: Results) -> tuple[Statement, ...]:
    """All that may be said, in the order of the questions: generalization, flatness, relation, cost."""
    if not results.final["test"].notna().any():
        return (Statement("nothing", "", "", "test", ""),)
    made = [*_differences(results)]
    primary = primary_flatness(results)
    return (
        *_highest(results),
        *(s for s in made if s.details["column"] == "test"),
        *([_extreme(results, primary)] if primary else []),
        *(s for s in made if s.details["column"] not in ("test", "gap")),
        *(s for s in made if s.details["column"] == "gap"),
        *_relations(results),
        *_cost(results),
    )


def _differences(results: Results) -> Iterator[Statement]:
    for row in differences(results).to_dict("records"):
        yield Statement(
            kind="difference",
            subject=row["method"],
            condition=row["condition"],
            quantity=row["header"],
            claim=f"differs from {row['reference']}" if _claim(row) else "",
            estimate=known(row["estimate"]),
            low=known(row["low"]),
            high=known(row["high"]),
            scale=row["scale"],
            n=int(row["n"]),
            basis=row["interval"],
            role=row["role"],
            reservations=tuple(_reservations(results, row)),
            details=_difference_details(results, row),
        )


def _claim(row: Mapping[Any, Any]) -> bool:
    """Only the main comparisons claim a difference: their number is what the error rate is kept for."""
    return bool(row["verdict"] == "differs" and row["role"] == "main")


def _difference_details(results: Results, row: Mapping[Any, Any]) -> dict[str, Any]:
    shown = difference_scale(results, row)
    seeds = row["seeds_for_a_point"]
    return {
        "column": row["quantity"],
        "reference": row["reference"],
        "verdict": row["verdict"],
        "p": known(row["p"]),
        "p_exact": known(row["p_exact"]),
        "exact": bool(row["exact"]),
        "family": int(row["family"]),
        "smallest": known(row["smallest"]),
        "seeds_for_a_point": None if seeds is None or seeds != seeds else int(seeds),
        "in_points": bool(row["quantity"] == "test" and shown.scale == 100),
        "scale": shown.scale,
        "unit": shown.difference,
        "lower_is_flatter": row["quantity"] not in ("test", "gap"),
    }


def _reservations(results: Results, row: Mapping[Any, Any]) -> Iterator[str]:
    """Of one comparison."""
    final = results.final
    here = final if row["condition"] == ALL else final[final["condition"] == row["condition"]]
    for method in (row["method"], row["reference"]):
        own = here[here["method"] == method]
        for state in ("diverged", "failed"):
            if count := int((own["state"] == state).sum()):
                yield f"{count} of {len(own)} runs of {method} {state} and are left out, which flatters it"
    if row["lost"] > 0 and row["n"] > 0:
        yield f"{row['n']} of the study's {len(results.seeds)} seeds have both values"
    if row["role"] == "further":
        yield "one of many further comparisons, not counted in the error rate of the main ones"
    if row["n"] > 1 and not row["exact"]:
        yield (
            f"{row['n']} seeds are too few for the exact sign-flip test over {row['family']} comparisons: "
            "the interval takes differences to be normally distributed"
        )


def _level_details(results: Results, quantity: Quantity) -> dict[str, Any]:
    """Each method's mean by condition, in the stored unit; geometric where ratios are compared."""
    values = method_values(results, quantity).dropna()
    means: dict[str, dict[str, float]] = {}
    groups: Any = values.groupby(level=["condition", "method"], sort=False)
    for (condition, method), own in groups:
        mean = float(own.mean())
        means.setdefault(str(condition), {})[str(method)] = rounded(
            math.exp(mean) if on_log_scale(results, quantity) else mean
        )
    return {
        c: {m: means[c][m] for m in results.methods if m in means[c]}
        for c in results.conditions
        if c in means
    }


def _highest(results: Results) -> Iterator[Statement]:
    test = compared(results)[0]
    for condition, means in _level_details(results, test).items():
        if not means:
            continue
        name = max(means, key=lambda m: means[m])
        names = results.final.loc[results.final["condition"] == condition, "metric"].dropna()
        shown = metric(str(names.iloc[0]))
        yield Statement(
            kind="highest",
            subject=name,
            condition=condition,
            quantity=shown.header("Test"),
            claim="",
            estimate=means[name],
            n=len(results.seeds),
            basis=_unit_of_comparison(results),
            reservations=("the highest of several means is too high on average",),
            details={"means": means, "scale": shown.scale, "unit": shown.unit},
        )


def _unit_of_comparison(results: Results) -> str:
    if results.tuned:
        return "the configuration chosen on validation data"
    if summary(results).duplicated(["condition", "method"]).any():
        return "the mean over the method's whole grid: nothing was selected"
    return "the one configuration of each method"


def _extreme(results: Results, quantity: Quantity) -> Statement:
    """The flattest method by the primary measure, over all conditions: by the mean of ratios or values."""
    means = _level_details(results, quantity)
    log = on_log_scale(results, quantity)
    shared = [m for m in results.methods if all(m in own for own in means.values())]
    overall = {}
    for method in shared:
        values = [math.log(own[method]) if log else own[method] for own in means.values()]
        mean = sum(values) / len(values)
        overall[method] = rounded(math.exp(mean) if log else mean)
    better = quantity.better == "lower"
    name = min(overall, key=lambda m: overall[m]) if overall and better else ""
    return Statement(
        kind="flattest",
        subject=name,
        condition=ALL if len(results.conditions) > 1 else "",
        quantity=quantity.header,
        claim="",
        estimate=overall.get(name),
        scale="ratio" if log else "difference",
        n=len(results.seeds),
        basis=_unit_of_comparison(results) + ("; geometric mean" if log else ""),
        details={"means": overall, "column": quantity.column},
    )


def _relations(results: Results) -> Iterator[Statement]:
    primary = primary_flatness(results)
    for (quantity, target), found in relations(results).items():
        evidence = found.evidence
        rising = "higher" if target == "test" else "larger"
        falling = "lower" if target == "test" else "smaller"
        claim = {1: rising, -1: falling}.get(found.sign, "")
        name = "test metric" if target == "test" else "generalization gap"
        yield Statement(
            kind="relation",
            subject=quantity.header,
            condition=ALL if len(results.conditions) > 1 else "",
            quantity=name,
            claim=f"sharper minima go with a {claim} {name}" if claim else "",
            estimate=known(evidence.estimate) if evidence else None,
            low=known(evidence.low) if evidence else None,
            high=known(evidence.high) if evidence else None,
            scale="Kendall's tau",
            n=found.configurations,
            basis=evidence.method if evidence else "no relation within methods can be seen",
            role="main" if quantity == primary and target == "test" else "further",
            reservations=("a relation is no proof of a cause",),
            details=_relation_details(found, quantity, target),
        )


def _relation_details(found: Relation, quantity: Quantity, target: str) -> dict[str, Any]:
    def numbers(interval: Any) -> dict[str, Any]:
        return {
            "estimate": known(interval.estimate),
            "low": known(interval.low),
            "high": known(interval.high),
        }

    return {
        "column": quantity.column,
        "target": target,
        "verdict": found.verdict,
        "levels": {name: numbers(interval) for name, interval in found.levels.items()},
        "by_condition": {name: numbers(interval) for name, interval in found.by_condition.items()},
        "p": known(found.p),
        "runs": found.runs,
        "configurations": found.configurations,
        "methods": found.methods,
    }


def _cost(results: Results) -> Iterator[Statement]:
    quantity = main_cost(results)
    data = summary(results)
    if f"{quantity.column}_mean" not in data:
        return
    rows = data.dropna(subset=[f"{quantity.column}_mean"])
    means = rows.groupby("method", sort=False)[f"{quantity.column}_mean"].mean()
    if means.empty:
        return
    yield Statement(
        kind="cost",
        subject="",
        condition=ALL if len(results.conditions) > 1 else "",
        quantity=quantity.header,
        claim="",
        n=len(results.seeds),
        basis={
            "paired": "timed in turns with plain LoRA",
            "alone": "timed during training, each run on cores of its own",
            "": "counted, not timed",
        }[timing(results)],
        reservations=()
        if timed(results)
        else (
            "no time is given: runs neither were timed in turns with plain LoRA (`cost: paired`) nor are "
            "known "
            "to have had their cores to themselves",
        ),
        details={"means": {str(m): rounded(float(v)) for m, v in means.items()}, "timed": timed(results)},
    )
