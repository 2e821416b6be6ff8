"""Does flatness go with generalization? Asked at several levels, and answered only where they agree.

A relation over all runs may come from differences between methods (each method alone may show the reverse:
Simpson's paradox), or from the learning rate, which moves flatness and test metric both. So the levels are,
from the fairest to the plainest: one hyper-parameter moved at a time, runs of one method, runs at one
learning rate, all runs. Only runs under the same condition are ever compared. The evidence is that
within methods; the other levels may take a claim back, not make one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from flatbench.report.analysis.correlation import (
    KEYS,
    Columns,
    coded,
    correlate,
    select,
    within_p_value,
)
from flatbench.report.analysis.quantities import Quantity, main_flatness
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import Interval

#: coefficient -> what it compares, in the order in which they are told
LEVELS = {
    "granulated_kendall": "one hyper-parameter moved at a time",
    "within_kendall": "within methods",
    "equal_lr": "at equal learning rate",
    "kendall": "across methods",
}
#: a level agrees with the evidence if it has its sign and at least this share of its size
SHARE = 1 / 3
TARGETS = ("test", "gap")


@dataclass(frozen=True)
class Relation:
    """One flatness measure and one quantity of generalization.

    Attributes:
        levels: of `LEVELS`, those that are defined.
        by_condition: τ within methods under each condition, if there are several.
        p: permutation p of no relation within methods; NaN where nothing can be permuted.
        verdict: ``sign`` (the only one that claims one), ``conditions`` (they contradict each other),
            ``between methods`` (there is evidence, and all runs contradict it), ``learning rate`` (at equal
            learning rate or one hyper-parameter at a time it is not there), ``undetermined``,
            ``too few``, ``none``.
    """

    levels: Mapping[str, Interval]
    by_condition: Mapping[str, Interval]
    p: float
    runs: int
    configurations: int
    methods: int
    verdict: str = field(default="")

    @property
    def evidence(self) -> Interval | None:
        """The level that a claim rests on: within methods, or all runs of a single method."""
        return self.levels.get("within_kendall" if self.methods > 1 else "kendall")

    @property
    def sign(self) -> int:
        """1 if sharper minima are claimed to go with a higher value, −1 with a lower one, 0 for no claim."""
        return _sign(self.evidence.estimate) if self.verdict == "sign" and self.evidence else 0


def relation(runs: Columns, x: str, y: str, hyper: Sequence[str]) -> Relation:
    """Relate two columns of final runs (see `flatbench.report.analysis.correlation.correlate`)."""
    both = np.isfinite(np.asarray(runs[x], dtype=float)) & np.isfinite(np.asarray(runs[y], dtype=float))
    known = select(runs, both)
    several = len(np.unique(known["method"])) > 1
    name = "within_kendall" if several else "kendall"
    found = correlate(known, x, y, hyper, only=[*LEVELS])
    levels = {key: found.by_name[key] for key in LEVELS if key in found.by_name}
    if not _grid(known):  # nothing but seeds within methods: no relation between configurations
        levels = {k: v for k, v in levels.items() if k == "kendall" and several}
    conditions = {}
    kinds = list(dict.fromkeys(known["condition"].tolist()))
    for kind in kinds if len(kinds) > 1 and name in levels else ():
        own = select(known, known["condition"] == kind)
        if interval := correlate(own, x, y, [], only=[name]).by_name.get(name):
            conditions[str(kind)] = interval
    made = Relation(
        levels=levels,
        by_condition=conditions,
        p=within_p_value(known, x, y, hyper) if name in levels else math.nan,
        runs=found.runs,
        configurations=found.configurations,
        methods=len(np.unique(known["method"])),
    )
    return replace(made, verdict=_verdict(made))


def _grid(known: Mapping[str, Any]) -> bool:
    """Whether some method has several configurations under one condition."""
    cells = list(zip(known["condition"].tolist(), known["method"].tolist(), strict=True))
    return len(set(zip(cells, known["configuration"].tolist(), strict=True))) > len(set(cells))


def _verdict(made: Relation) -> str:
    found = made.evidence
    if found is None or math.isnan(found.estimate):
        return "none"
    if not found.known:
        return "too few"
    signs = {_sign(i.estimate) for i in made.by_condition.values() if i.excludes(0)}
    if len(signs) > 1:
        return "conditions"
    if not found.excludes(0) or not made.p <= 1 - found.level:
        return "undetermined"
    if not _agrees(found, made.levels.get("kendall")):
        return "between methods"
    if not all(_agrees(found, made.levels.get(name)) for name in ("granulated_kendall", "equal_lr")):
        return "learning rate"
    if any(_sign(interval.estimate) == -_sign(found.estimate) for interval in made.by_condition.values()):
        return "conditions"
    return "sign"


def _agrees(found: Interval, other: Interval | None) -> bool:
    """Whether a level, if it is defined, has the sign of the evidence and a part of its size."""
    if other is None or math.isnan(other.estimate):
        return True
    return other.estimate * _sign(found.estimate) >= SHARE * abs(found.estimate)


def _sign(value: float) -> int:
    return int(value > 0) - int(value < 0)


@lru_cache(maxsize=2)
def relations(results: Results) -> dict[tuple[Quantity, str], Relation]:
    """The main flatness measures against `TARGETS`."""
    final = results.final
    hyper = [c for c in final.columns if str(c).startswith("hyper.")]
    narrow = coded(final[[*KEYS, "seed", *TARGETS, *hyper]])
    labels = dict(zip(narrow["condition"].tolist(), final["condition"], strict=True))
    found = {}
    for quantity in main_flatness(results):
        runs = narrow | {"x": pd.to_numeric(final[quantity.column], errors="coerce").to_numpy(dtype=float)}
        for target in TARGETS:
            if (np.isfinite(runs["x"]) & np.isfinite(runs[target])).any():
                made = relation(runs, "x", target, hyper)
                named = {str(labels[int(code)]): v for code, v in made.by_condition.items()}
                found[quantity, target] = replace(made, by_condition=named)
    return found
