"""State the findings in sentences made from the numbers: no claim that an interval does not support."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from flatbench.report.analysis.evidence import ALL, comparisons, correlations, difference_scale
from flatbench.report.analysis.quantities import lower_first, main_flatness, metric
from flatbench.report.analysis.results import Results
from flatbench.report.analysis.statistics import MIN_CLUSTERS
from flatbench.report.analysis.summary import summary
from flatbench.report.numbers import fixed, significant
from flatbench.report.tables.cells import number


def findings(results: Results) -> list[str]:
    """Findings by condition: the means with their spread, differences to the baseline, and correlations."""
    found = []
    for condition, rows in summary(results).groupby("condition", sort=False):
        prefix = f"{condition!s}: " if condition else ""
        found += [prefix + text for text in _condition_findings(results, rows)]
    return [*found, *_comparison_findings(results), *_correlation_findings(results)]


def _condition_findings(results: Results, rows: Any) -> Iterator[str]:
    usable = rows.dropna(subset=["test_mean"])
    if usable.empty:
        yield "No final run has a test metric yet."
        return
    if usable["method"].duplicated().any():
        yield f"{len(usable)} configurations were trained with the final seeds, none was selected."
        return
    shown = metric(str(usable["metric"].iloc[0]))
    ordered = usable.sort_values("test_mean", ascending=False, kind="stable")
    texts = [_mean_text(row, shown) for row in ordered.to_dict("records")]
    yield f"{shown.header('Test')}, highest mean first: {', '.join(texts)}."
    yield from _flattest(results, usable)


def _mean_text(row: Mapping[str, Any], shown: Any) -> str:
    mean, std = row["test_mean"] * shown.scale, row["test_std"] * shown.scale
    decimals = 1 if shown.unit else 3
    spread = f" ± {fixed(std, decimals)}" if std == std else ""
    count = int(row["test_n"])
    return f"{row['method']} {fixed(mean, decimals)}{spread} ({count} seed{'s' if count != 1 else ''})"


def _flattest(results: Results, rows: Any) -> Iterator[str]:
    parts = []
    for quantity in main_flatness(results):
        column = f"{quantity.column}_mean"
        known = rows.dropna(subset=[column])
        if len(known) > 1:
            low, high = known.loc[known[column].idxmin()], known.loc[known[column].idxmax()]
            parts.append(
                f"{lower_first(quantity.header)} from {number(low[column])[0]} ({low['method']}) to "
                f"{number(high[column])[0]} ({high['method']})"
            )
    if parts:
        yield f"Means of {' and of '.join(parts)}."


def _comparison_findings(results: Results) -> Iterator[str]:
    """Differences to the baseline whose intervals exclude zero, over all conditions if there are several."""
    data = comparisons(results)
    if data.empty:
        return
    conditions = set(data["condition"])
    for condition, rows in data.groupby("condition", sort=False):
        if ALL in conditions and condition != ALL:
            continue
        prefix = f"{condition!s}: " if condition else ""
        known = rows[rows["low"].notna() & rows["high"].notna()]
        if known.empty:
            yield f"{prefix}no difference to {results.baseline} has an interval: there are too few seeds."
            continue
        apart = (known["low"] > 0) | (known["high"] < 0)
        yield prefix + _apart_text(results, known[apart], known[~apart])
        yield from (prefix + text for text in too_few_pairs(int(known["n"].max())))


def too_few_pairs(pairs: int) -> Iterator[str]:
    """Why no p value can be small where an interval excludes zero all the same."""
    least = 2.0 ** (1 - pairs)
    if least > 0.05:
        yield (
            f"with {pairs} paired seeds the sign-flip test cannot give a p below {least:g}: the intervals "
            "rest on the differences being normally distributed."
        )


def _apart_text(results: Results, apart: pd.DataFrame, together: pd.DataFrame) -> str:
    sentences = []
    if len(apart):
        texts = [_difference_text(results, row) for row in apart.to_dict("records")]
        sentences.append(
            f"the 95 % interval of the difference to {results.baseline} excludes zero for {', '.join(texts)}"
        )
    if len(together):
        texts = [_difference_text(results, row) for row in together.to_dict("records")]
        names = ", ".join(texts)
        sentences.append(f"the difference to {results.baseline} is not distinguishable from zero for {names}")
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def _difference_text(results: Results, row: Mapping[Any, Any]) -> str:
    shown = difference_scale(results, row)
    decimals = 1 if shown.unit else 3
    ends = (row[key] * shown.scale for key in ("difference", "low", "high"))
    estimate, low, high = (fixed(value, decimals, sign=True) for value in ends)
    adjusted = "" if math.isnan(row["p_holm"]) else f", Holm-adjusted p {significant(row['p_holm'], 2)}"
    return f"{row['method']} {estimate} [{low}, {high}]{adjusted}"


_SENTENCES = {
    "test": ("test metric", "go with a lower test metric", "go with a higher test metric"),
    "gap": (
        "generalization gap",
        "go with a smaller generalization gap",
        "go with a larger generalization gap",
    ),
}


def _correlation_findings(results: Results) -> Iterator[str]:
    """Kendall's tau of the main sharpness measures across methods, stated as far as its interval allows."""
    data = correlations(results)
    if data.empty:
        return
    if data["low"].isna().all():
        yield (
            f"No relation between flatness and generalization is claimed: {data['configurations'].max()} "
            f"configurations are too few for an interval ({MIN_CLUSTERS} are needed)."
        )
        return
    scope = ALL if len(results.conditions) > 1 else results.conditions[0]
    for quantity in main_flatness(results):
        for against, words in _SENTENCES.items():
            rows = data[
                (data["measure"] == quantity.column) & (data["against"] == against) & (data["method"] == "")
            ]
            for row in rows[rows["condition"] == scope].to_dict("records"):
                if row["coefficient"] == "kendall":
                    yield _relation(lower_first(quantity.header), words, row)
                elif row["coefficient"] == "partial_spearman":
                    yield (
                        "Among runs that fit the training data equally well (partial Spearman's ρ given "
                        f"the training loss) it is {_with_interval(row)}."
                    )
            if scope == ALL:
                yield from _by_condition(
                    rows[(rows["condition"] != ALL) & (rows["coefficient"] == "kendall")]
                )


def _relation(flatness: str, words: tuple[str, str, str], row: Mapping[Any, Any]) -> str:
    """One coefficient in a sentence that claims a sign only where the interval supports it."""
    name, falling, rising = words
    estimate, low, high = _signed_texts(row)
    start = f"Kendall's τ of {flatness} and {name} is {estimate}"
    basis = f"{row['runs']} runs of {row['configurations']} configurations"
    interval = f"95 % interval {low} to {high}, {basis}"
    if row["high"] < 0:
        return f"{start} ({interval}): sharper minima {falling} here."
    if row["low"] > 0:
        return f"{start} ({interval}): sharper minima {rising} here."
    return f"{start} ({interval}): the sign is undetermined."


def _by_condition(rows: pd.DataFrame) -> Iterator[str]:
    known = rows.dropna(subset=["low"])
    if len(known):
        texts = [f"{r['condition']} {_with_interval(r)}" for r in known.to_dict("records")]
        yield f"Condition by condition it is {'; '.join(texts)}."


def _with_interval(row: Mapping[Any, Any]) -> str:
    estimate, low, high = _signed_texts(row)
    return f"{estimate} [{low}, {high}]"


def _signed_texts(row: Mapping[Any, Any]) -> list[str]:
    return [fixed(row[key], 2, sign=True) for key in ("estimate", "low", "high")]
