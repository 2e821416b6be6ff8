"""Names, units and directions (higher or lower is better) of a report's quantities."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from flatbench.config.words import condition_words as condition_words
from flatbench.report.analysis.results import Results

Better = Literal["higher", "lower", "neither"]

#: metrics that the field writes as percentages, and those that it multiplies by 100 without calling them so
_PERCENT = {"accuracy": "accuracy", "f1": "F1", "exact_match": "exact match"}
_HUNDREDFOLD = {
    "matthews": "Matthews correlation",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "spearmanr": "Spearman correlation",
}
_SPACES = {"merged": "merged weights", "adapter": "adapter A, B", "all": "all weights"}
_MATRICES = {"hessian": "Hessian", "gauss_newton": "Gauss-Newton"}
#: options of measures that are seldom used and make the numbers other ones
_DETAILS = {
    ("norm", "linf"): "l∞ norm",
    ("gauge", "balanced"): "balanced A and B",
    ("normalise_logits", True): "normalized logits",
}


@dataclass(frozen=True)
class Metric:
    """A task's metric as it is shown.

    Attributes:
        name: as in a sentence.
        scale: shown value = stored value x scale.
        unit: of the shown value; "" if there is none. ``difference``: unit of a difference.
    """

    name: str
    scale: float = 1.0
    unit: str = ""
    difference: str = ""

    def header(self, prefix: str) -> str:
        """Column or axis name, such as ``Test accuracy (%)``."""
        return f"{prefix} {self.name}" + (f" ({self.unit})" if self.unit else "")


def metric(name: str) -> Metric:
    """How a metric is shown: accuracies in percent, correlations times 100, others as they are."""
    if name in _PERCENT:
        return Metric(_PERCENT[name], 100.0, "%", "points")
    if name in _HUNDREDFOLD:
        return Metric(_HUNDREDFOLD[name], 100.0, "× 100", "× 100")
    return Metric(name)


@dataclass(frozen=True)
class Quantity:
    """A column of per-run numbers as it is shown.

    Attributes:
        column: in `Results.final`.
        header: names the quantity and its unit, and needs no legend.
        scale: shown value = stored value x scale.
        decimals: fixed number of decimals, or None for three significant digits.
    """

    column: str
    header: str
    better: Better = "neither"
    scale: float = 1.0
    decimals: int | None = None

    @property
    def label(self) -> str:
        """The measure that the column belongs to."""
        return self.column.partition(".")[0]


def flatness(results: Results) -> list[Quantity]:
    """The sharpness of every measure that has one: of balls, top eigenvalues, traces, slices."""
    return list(_flatness(results))


@lru_cache(maxsize=2)
def _flatness(results: Results) -> list[Quantity]:
    kinds = {
        "sharpness": "SAM sharpness",
        "eigenvalue_1": "Top Hessian eigenvalue",
        "trace": "Hessian trace",
        "mean_rise": "Mean loss rise along slices",
    }
    found = [(c, kind) for value, kind in kinds.items() for c in results.columns(value)]
    names = [_measure_name(results, column, kind) for column, kind in found]
    ranks: list[Better] = [
        _eigenvalue(results, column)[1] if column.endswith(".eigenvalue_1") else "lower"
        for column, _ in found
    ]
    return [
        Quantity(column, name if names.count(name) == 1 else f"{name} [{column.partition('.')[0]}]", better)
        for (column, _), name, better in zip(found, names, ranks, strict=True)
    ]


def paired_time(results: Results) -> Quantity:
    """Time per step over that of plain LoRA, from steps of both in turns."""
    column = results.column("paired_ratio") or "-"
    return Quantity(column, "Time per step relative to LoRA, paired", "lower", 1.0, 2)


#: share of its busy time for which a run may have waited for a core and still have had its cores to itself
MOST_WAITING = 0.02


def timing(results: Results) -> str:
    """How times are measurements: ``paired``, ``alone``, or "" if they are none.

    ``paired``: every trained run was timed in turns with plain LoRA. ``alone``: none waited for a core in
    more than `MOST_WAITING` of the time in which it had work, and all ran on one kind of machine with equal
    threads and equally many runs beside them. Other times say as much about what else the machine did.
    """
    column = paired_time(results).column
    trained = results.final[results.final["test"].notna()]
    if not len(trained):
        return ""
    if column in trained and trained[column].notna().all():
        return "paired"
    waits = results.column("core_wait_share")
    if waits is None or not trained["time_ratio"].notna().all():
        return ""
    label = waits.partition(".")[0]
    alike = ("processor", "device", "cores", "threads")
    places = {tuple(e.get(name) for name in alike) for e in results.environments}
    beside = trained[f"{label}.jobs"].nunique(dropna=False) if f"{label}.jobs" in trained else 1
    shares = trained[waits].astype(float)
    quiet = bool(shares.notna().all() and (shares <= MOST_WAITING).all())
    return "alone" if quiet and len(places) <= 1 and beside == 1 else ""


def timed(results: Results) -> bool:
    """Whether times are measurements, one way or the other (see `timing`)."""
    return timing(results) != ""


def main_cost(results: Results) -> Quantity:
    """Time per step relative to plain LoRA where it was measured, else gradients per step."""
    if how := timing(results):
        return paired_time(results) if how == "paired" else own_time(results)
    return Quantity(results.column("gradients_per_step") or "-", "Gradients per step", "neither", 1.0, 0)


def own_time(results: Results) -> Quantity:
    """Time per step over that of the baseline's run, each timed while it was trained."""
    return Quantity("time_ratio", f"Time per step relative to {results.baseline}", "lower", 1.0, 2)


def _eigenvalue(results: Results, column: str) -> tuple[str, Better]:
    """What an eigenvalue is, by the end of the spectrum and the matrix, and whether a lower one is flatter.

    Of eigenvalues by magnitude a negative one may be the largest, and the smallest of all says how much of a
    saddle a point is: neither tells flat from sharp by its sign. Older runs do not say their matrix.
    """
    label = column.partition(".")[0]
    ends = _all_of(results, label, "which") or {"LM"}
    matrices = _all_of(results, label, "matrix") or {"hessian"}
    if len(ends) > 1 or len(matrices) > 1:
        return "Eigenvalue, not of one kind", "neither"
    (end,), (kind,) = ends, matrices
    matrix = _MATRICES.get(kind, kind)
    if end == "LA" or (end == "LM" and kind == "gauss_newton"):  # which has no negative ones
        return f"Largest {matrix} eigenvalue", "lower"
    return (
        f"Smallest {matrix} eigenvalue" if end == "SA" else f"{matrix} eigenvalue of largest magnitude"
    ), "neither"


def _all_of(results: Results, label: str, value: str) -> set[str]:
    """What the runs say of a measure."""
    column = f"{label}.{value}"
    return set(map(str, results.table[column].dropna())) if column in results.table else set()


def main_flatness(results: Results) -> list[Quantity]:
    """One SAM sharpness and one top eigenvalue for the main table.

    Of the Hessian rather than of another matrix, and where lower is flatter; then of the merged weights,
    since they are what inference uses and do not depend on how B·A is factored.
    """

    def rank(quantity: Quantity) -> tuple[bool, bool, bool]:
        hessian = _all_of(results, quantity.label, "matrix") <= {"hessian"}
        return hessian, quantity.better == "lower", _is_merged(results, quantity)

    chosen: dict[str, Quantity] = {}
    for quantity in flatness(results):
        kind = quantity.column.partition(".")[2]
        if kind in ("sharpness", "eigenvalue_1") and (
            kind not in chosen or rank(quantity) > rank(chosen[kind])
        ):
            chosen[kind] = quantity
    return list(chosen.values())


def _is_merged(results: Results, quantity: Quantity) -> bool:
    return bool(results.constant(quantity.label, "space") == "merged")


def _measure_name(results: Results, column: str, kind: str) -> str:
    """The kind with what makes its numbers other ones: space, radius, and options that are seldom used."""
    label = column.partition(".")[0]
    space = results.constant(label, "space")
    rho = results.constant(label, "rho") or results.constant(label, "rho_1")
    if kind == "SAM sharpness" and (case := results.constant(label, "kind")):
        metric = results.constant(label, "metric")
        kind = f"{str(case).capitalize()}-case {'' if metric == 'plain' else f'{metric} '}sharpness"
    if kind == "Top Hessian eigenvalue":
        kind = _eigenvalue(results, column)[0]
    details = [_SPACES.get(space, str(space))] if space is not None else []
    if rho is not None:
        details.append(f"rho {rho:g}")
    details += [
        text for (option, value), text in _DETAILS.items() if results.constant(label, option) == value
    ]
    return f"{kind} ({', '.join(details)})" if details else kind


def lower_first(text: str) -> str:
    """A header inside a sentence; abbreviations and names stay capital."""
    return text if text[:2].isupper() or text.startswith("Hessian") else text[:1].lower() + text[1:]


def tracked(results: Results) -> list[Quantity]:
    """What was measured during training too, as columns of the history: sharpness and balancedness."""
    known = set(map(str, results.history.columns))
    found = [q for q in flatness(results) if q.column in known]
    names = {
        "balancedness": "Balancedness ‖B‖² − ‖A‖²",
        "imbalance": "Imbalance |‖B‖² − ‖A‖²| / (‖B‖² + ‖A‖²)",
        "ema_sharpness": "EMA sharpness L(B + Ê) − L(B)",
        "gap": "EMA sharpness − SAM sharpness",
    }
    measured = results.content.get("measures", {})
    # one that is taken during training alone has no column among the finished runs'
    columns = [c for c in map(str, results.history.columns) if c.partition(".")[0] in measured]
    return found + [Quantity(c, names[v]) for c in columns if (v := c.partition(".")[2]) in names]
