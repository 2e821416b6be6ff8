"""Differences of each method to the reference, in test metric, gap and every flatness measure.

One value stands for a method, condition and seed: that of the configuration which validation data chose, or,
where nothing was selected, the mean over the method's whole grid (picking its best configuration by the final
seeds would be selecting). Values of one seed are paired; over several conditions the mean of each seed's
differences is taken, so that a seed counts once (see `flatbench.report.analysis.inference`). Eigenvalues and
traces are compared as ratios, on a logarithmic scale, where all are positive.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.inference import Judgement, judge, mean_over_conditions
from flatbench.report.analysis.quantities import Metric, Quantity, flatness, main_flatness, metric
from flatbench.report.analysis.results import Results
from flatbench.report.numbers import rounded

ALL = "all conditions"
#: one point of a metric that is shown times 100
POINT = 0.01


def shared_metric(results: Results) -> Metric | None:
    """How the main metric is shown if all conditions show theirs on one scale, else None."""
    shown = [metric(str(name)) for name in results.final["metric"].dropna().unique()]
    if not shown or len({(m.scale, m.unit) for m in shown}) > 1:
        return None
    return (
        shown[0] if len(shown) == 1 else Metric("metric", shown[0].scale, shown[0].unit, shown[0].difference)
    )


def reference(results: Results) -> str | None:
    """The method that others are compared with: the baseline, or else the study's first method."""
    return results.baseline or next(iter(results.methods), None)


def primary_flatness(results: Results) -> Quantity | None:
    """The one flatness measure that claims rest on: the largest eigenvalue, or else what there is."""
    found = [q for q in main_flatness(results) if _has_values(results, q.column)]
    return next((q for q in found if q.column.endswith(".eigenvalue_1")), next(iter(found), None))


def compared(results: Results) -> list[Quantity]:
    """Every quantity that methods are compared in, those that claims rest on first."""
    shown = shared_metric(results) or Metric("metric")
    unit = f" ({shown.difference})" if shown.difference else ""
    primary = primary_flatness(results)
    found = [Quantity("test", f"Test {shown.name}{unit}", "higher", shown.scale)]
    found += [primary] if primary else []
    found += [Quantity("gap", f"Generalization gap: train − test {shown.name}{unit}", "neither", shown.scale)]
    return found + [q for q in flatness(results) if q != primary and _has_values(results, q.column)]


def _has_values(results: Results, column: str) -> bool:
    return bool(pd.to_numeric(results.final[column], errors="coerce").notna().any())


def on_log_scale(results: Results, quantity: Quantity) -> bool:
    """Whether a quantity is compared by its ratio: eigenvalues and traces that are positive throughout."""
    if not quantity.column.endswith((".eigenvalue_1", ".trace")):
        return False
    values = pd.to_numeric(results.final[quantity.column], errors="coerce").dropna()
    return bool(len(values)) and bool((values > 0).all())


def method_values(results: Results, quantity: Quantity) -> pd.Series[float]:
    """A value a condition, method and seed (the index), logarithms where `on_log_scale`; NaN where a run that
    belongs to it has none: of a grid in which a configuration diverged there is no mean over the rest, which
    would make a method the better the more of it diverges."""
    final = results.final
    values = pd.to_numeric(final[quantity.column], errors="coerce").astype(float)
    values = values.where(np.isfinite(values))
    if on_log_scale(results, quantity):
        values = values.map(math.log, na_action="ignore")
    cells = [final[name] for name in ("condition", "method")]
    seeds, known = final["seed"], values.notna()
    # a configuration without a single value, because it was never measured or is still to be trained, is none
    # that could be averaged over; one whose runs diverged is a part of the grid, which has no mean then
    lost = final["state"].isin(["diverged", "failed"])
    alive = (known | lost).groupby([*cells, final["configuration"]]).transform("any")
    count = final["configuration"].where(alive).groupby(cells).transform("nunique")
    per_seed = [*(c[alive] for c in cells), seeds[alive]]
    means = values[alive].groupby(per_seed, sort=False).agg(["mean", "count"])
    wanted = count[alive].groupby(per_seed, sort=False).first()
    return means["mean"].where(means["count"] == wanted)


@lru_cache(maxsize=2)
def differences(results: Results) -> pd.DataFrame:
    """Every method minus the reference in every quantity: a row a quantity, condition and method.

    Columns: ``quantity``, ``header``, ``condition`` (with several conditions also `ALL`), ``method``,
    ``reference``, ``role`` (``main`` for what claims rest on), ``scale`` (``difference`` or ``ratio``),
    ``estimate``, ``low``, ``high``, ``p`` (simultaneous over the ``family``), ``p_exact``, ``exact``, ``n``
    (seeds), ``lost`` (seeds of the study that are not among them), ``spread`` (of a difference),
    ``smallest`` (what this design could have seen at 80 % power, as a difference or a ratio),
    ``seeds_for_a_point``, ``verdict`` and ``interval`` (how it was made, or why there is none).
    """
    base = reference(results)
    if base is None or results.final.empty or len(results.methods) < 2:
        return pd.DataFrame()
    groups: dict[tuple[Quantity, str], dict[str, dict[int, float]]] = {}
    for quantity in compared(results):
        for condition, method, per_seed in _pair(results, quantity, base):
            groups.setdefault((quantity, condition), {})[method] = per_seed
    mains = [key for key in groups if _is_main(results, groups, *key)]
    family = sum(len(groups[key]) for key in mains)
    rows = []
    for (quantity, condition), own in groups.items():
        judged = judge([[*d.values()] for d in own.values()], family)
        main = (quantity, condition) in mains
        for method, found in zip(own, judged, strict=True):
            rows.append(_row(results, quantity, condition, method, base, found, main))
    return pd.DataFrame(rows)


def _pair(results: Results, quantity: Quantity, base: str) -> Iterator[tuple[str, str, dict[int, float]]]:
    values = method_values(results, quantity).dropna()
    table: dict[tuple[str, str], dict[int, float]] = {}
    labels: Any = values.index
    for (condition, method, seed), value in zip(labels, values, strict=True):
        table.setdefault((condition, method), {})[int(seed)] = float(value)
    others = [m for m in results.methods if m != base]
    several = len(results.conditions) > 1
    found: dict[tuple[str, str], dict[int, float]] = {}
    for condition in results.conditions:
        ours = table.get((condition, base), {})
        for method in others:
            own = table.get((condition, method), {})
            if ours and own:
                size = max(map(abs, (*ours.values(), *own.values())))
                found[condition, method] = {
                    s: rounded(own[s] - ours[s], size) for s in results.seeds if s in own and s in ours
                }
    if several and not (quantity.column in ("test", "gap") and shared_metric(results) is None):
        for method in others:
            if all((c, method) in found for c in results.conditions):
                yield ALL, method, mean_over_conditions([found[c, method] for c in results.conditions])
    for (condition, method), own in found.items():
        yield condition, method, own


def _is_main(results: Results, groups: Mapping[Any, Any], quantity: Quantity, condition: str) -> bool:
    """Claims rest on test metric and primary flatness, over all conditions where that has a meaning."""
    primary = primary_flatness(results)
    if quantity.column not in ("test", primary.column if primary else "test"):
        return False
    return condition == ALL or (quantity, ALL) not in groups


def _row(
    results: Results, quantity: Quantity, condition: str, method: str, base: str, found: Judgement, main: bool
) -> dict[str, Any]:
    interval, log = found.interval, on_log_scale(results, quantity)
    numbers = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    numbers["smallest"] = found.smallest
    numbers = {k: rounded(math.exp(min(v, 700.0)) if log else v) for k, v in numbers.items()}
    names = results.final.loc[results.final["condition"].isin([condition, *results.conditions]), "metric"]
    points = quantity.column == "test" and all(metric(str(n)).scale == 100 for n in names.dropna().unique())
    return {
        "quantity": quantity.column,
        "header": quantity.header,
        "condition": condition,
        "method": method,
        "reference": base,
        "role": "main" if main else "further",
        "scale": "ratio" if log else "difference",
        **numbers,
        "p": found.p,
        "p_exact": found.p_exact,
        "exact": found.exact,
        "n": interval.n,
        "lost": len(results.seeds) - interval.n,
        "spread": found.spread,
        "seeds_for_a_point": found.seeds_needed(POINT) if points else None,
        "family": found.family,
        "verdict": _verdict(found),
        "interval": interval.method,
    }


def _verdict(found: Judgement) -> str:
    if not found.interval.known:
        return "no interval"
    if found.interval.estimate == 0 and found.spread == 0:
        return "equal"
    if found.undecided:
        return "undecided"
    return "differs" if found.differs else "not distinguishable"


def difference_scale(results: Results, row: Mapping[Any, Any]) -> Metric:
    """How the numbers of a row of `differences` are shown, if they are those of a metric."""
    if row["quantity"] not in ("test", "gap"):
        return Metric(str(row["header"]))
    shared = shared_metric(results)
    if row["condition"] == ALL or (shared is not None and len(results.conditions) > 1):
        return shared if shared is not None else Metric("metric")
    final = results.final
    names = final.loc[final["condition"] == row["condition"], "metric"].dropna()
    return metric(str(names.iloc[0])) if len(names) else Metric("metric")
