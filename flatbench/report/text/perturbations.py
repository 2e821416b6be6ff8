"""Say what perturbations of A and B do to the merged weights, where the study took `interference`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from flatbench.report.analysis import interference
from flatbench.report.analysis.results import Results
from flatbench.report.numbers import significant

_NAMES = {
    "sam": "LoRA-SAM",
    "sam_linear": "LoRA-SAM without it",
    "flat_lora": "Flat-LoRA",
    "eflat_lora": "EFlat-LoRA",
}


def said(results: Results) -> str:
    """A sentence; "" if it was not taken. Means over all runs, whichever method trained them."""
    parts = list(_clauses(results))
    return f"Perturbations in the merged weights: {'; '.join(parts)}." if parts else ""


def headline(results: Results) -> str:
    """The same for a small screen: how much LoRA-SAM's term in both factors is; "" if that is unknown."""
    parts = [
        f"{_part(means)} at {interference.radius(results, label) or label}"
        for label, means in _measured(results)
    ]
    return f"LoRA-SAM's term in both factors: {', '.join(parts)} of its norm" if parts else ""


def _clauses(results: Results) -> Iterator[str]:
    for label, means in _measured(results):
        told = [
            f"{name} {significant(100 * own['part'], 2)} % (cosine {significant(own['cosine'], 2)})"
            for key, name in _NAMES.items()
            if (own := means.get(key)) and not math.isnan(own["part"])
        ]
        end = f", and of the loss's rise along the gradient, at equal norm, {', '.join(told)}" if told else ""
        where = interference.radius(results, label) or label
        yield f"at {where} LoRA-SAM's term in both factors has {_part(means)} of its norm{end}"


def _part(means: Mapping[str, Mapping[str, float]]) -> str:
    return f"{significant(100 * means['sam_cross']['share'] / means['sam']['share'], 2)} %"


def _measured(results: Results) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    """Labels with the means of the conditions' and methods' means, by perturbation and kind."""
    for label in interference.labels(results):
        found = interference.over_runs(results, label)
        if found.empty:
            continue
        values = found.groupby("perturbation")[["share_mean", "cosine_mean", "part_mean"]].mean()
        means: dict[str, dict[str, float]] = {
            str(name): {str(kind).removesuffix("_mean"): float(value) for kind, value in row.items()}
            for name, row in values.to_dict("index").items()
        }
        if means.get("sam", {}).get("share") and "sam_cross" in means:
            yield label, means
