"""Average what the measure `interference` told of each perturbation, over training and over runs."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd

from flatbench.report.analysis.results import Results

#: perturbations by the names of `flatbench.measures.interference`, as a reader knows them
PERTURBATIONS = {
    "full": "along the gradient G of W",
    "sam": "LoRA-SAM",
    "sam_linear": "LoRA-SAM but for its term in both factors",
    "sam_A": "LoRA-SAM's term in A, s·B·E_A",
    "sam_B": "LoRA-SAM's term in B, s·E_B·A",
    "sam_cross": "LoRA-SAM's term in both factors, s·E_B·E_A",
    "flat_lora": "Flat-LoRA",
    "eflat_lora": "EFlat-LoRA",
}
#: what is told of each: norm over rho, cosine with G, rise of the loss at the norm rho
KINDS = ("share", "cosine", "rise")


def labels(results: Results) -> list[str]:
    """Labels under which the study took `interference`."""
    measures = results.content.get("measures", {})
    return [label for label, config in measures.items() if config.get("name", label) == "interference"]


def radius(results: Results, label: str) -> str:
    """``ρ = …``, or "" if runs do not agree on it."""
    rho = results.constant(label, "rho")
    return "" if rho is None else f"ρ = {float(rho):g}"


def course(results: Results, label: str) -> pd.DataFrame:
    """Rows of condition, method, run, epoch, perturbation and `KINDS`, of each method's representative runs.

    Epochs are those after which it was taken; none (NaN) where it was taken of the trained model alone.
    """
    runs = results.representatives
    during = _taken(results.history, label)
    during = during[during["run"].isin(runs["run"])] if len(during) else during
    # of a run that was trained before `every` was set, the trained model alone
    after = _taken(runs[~runs["run"].isin(during["run"])] if len(during) else runs, label)
    source = pd.concat([part for part in (during, after) if len(part)] or [pd.DataFrame()])
    parts = []
    for name in PERTURBATIONS:
        columns = {kind: f"{label}.{name}_{kind}" for kind in KINDS}
        if columns["share"] not in source:
            continue
        part = source[["condition", "method", "run"]].assign(
            epoch=source["epoch"] if "epoch" in source else float("nan"),
            perturbation=name,
            **{
                kind: pd.to_numeric(source[c], errors="coerce") if c in source else float("nan")
                for kind, c in columns.items()
            },
        )
        parts.append(part.dropna(subset=["share"]))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _taken(rows: pd.DataFrame, label: str) -> pd.DataFrame:
    """The rows in which it was taken."""
    column = f"{label}.loss"
    return rows[pd.to_numeric(rows[column], errors="coerce").notna()] if column in rows else rows.iloc[:0]


@lru_cache(maxsize=4)
def over_runs(results: Results, label: str) -> pd.DataFrame:
    """`course` averaged within each run, then mean, standard deviation and number over runs.

    Columns: condition, method, perturbation and, of each of `KINDS` and of ``part`` (a run's mean rise over
    that along G), ``KIND_mean``, ``KIND_std``, ``KIND_n``.
    """
    points = course(results, label)
    if points.empty:
        return points
    keys = ["condition", "method", "perturbation"]
    within = points.groupby([*keys, "run"], sort=False)[list(KINDS)].mean().reset_index()
    # two methods may share a run; epochs without a rise are left out of G's mean too
    alike = ["condition", "method", "run", "epoch"]
    full = points.loc[points["perturbation"] == "full", [*alike, "rise"]].rename(columns={"rise": "best"})
    both = points.merge(full, on=alike, how="left").dropna(subset=["rise", "best"])
    sums = both.groupby([*keys, "run"], sort=False)[["rise", "best"]].sum()
    part = (sums["rise"] / sums["best"]).rename("part").reset_index()
    within = within.merge(part, on=[*keys, "run"], how="left")
    found = within.groupby(keys, sort=False)[[*KINDS, "part"]].agg(["mean", "std", "count"])
    found.columns = found.columns.map("_".join).str.replace("_count", "_n")
    return found.reset_index()
