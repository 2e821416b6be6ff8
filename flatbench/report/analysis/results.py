"""A study's results as a report uses them, read once, with the per-run numbers derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from flatbench import store
from flatbench.config.hyper_parameters import hyper_text
from flatbench.machine.beside import beside
from flatbench.report.numbers import rounded
from flatbench.store import tables

#: bytes of study.json from which on a study has thousands of runs
_LARGE = 1_000_000

#: prefixes of the results table's columns that belong to no measure
_OWN = {"hyper", "train", "validation", "test", "data"}


@dataclass(frozen=True, eq=False)
class Results:
    """A study's results.

    Attributes:
        table: a row a run, as `flatbench.store.table` gives it.
        history: a row a logging step or evaluation, as `flatbench.store.history` gives it.
        slices: a row a point of a loss slice, as `flatbench.store.slices` gives it.
        spectra: a row a point of a spectral density, as `flatbench.store.spectra` gives it.
        content: the content of study.json.
        environments: where the runs were trained, as `flatbench.store.environments` gives it.
    """

    table: pd.DataFrame
    history: pd.DataFrame
    slices: pd.DataFrame
    spectra: pd.DataFrame
    content: Mapping[str, Any]
    environments: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, folder: store.StudyFolder) -> Results:
        """Read a study's results. Raises InputError if there are none."""
        if folder.file.is_file() and folder.file.stat().st_size > _LARGE:
            # reading thousands of files leaves ten times the tables in memory that is not given back;
            # in a process of its own it goes with that
            return beside(lambda: cls._read(folder))()
        return cls._read(folder)

    @classmethod
    def _read(cls, folder: store.StudyFolder) -> Results:
        empty = pd.DataFrame()
        entries = tables.entries(folder)
        environments = store.environments(folder, entries)
        bare = cls(store.table(folder, entries), empty, empty, empty, folder.read(), environments)
        del entries  # of thousands of runs it is larger than all that follows
        # curves and slices are drawn of these runs only, and thousands of files take long to read
        runs = set(bare.representatives["run"])
        return replace(
            bare,
            history=store.history(folder, runs),
            slices=store.slices(folder, runs),
            spectra=store.spectra(folder, runs),
        )

    @property
    def name(self) -> str:
        """The study's name."""
        return str(self.content["study"]["name"])

    @property
    def methods(self) -> list[str]:
        """Names of the methods in the study's order."""
        return list(self.content["methods"])

    @property
    def conditions(self) -> list[str]:
        """Labels of the conditions in the study's order; one empty label if there is one condition."""
        return list(self.content["conditions"])

    @property
    def seeds(self) -> list[int]:
        """Seeds of the final runs."""
        return list(self.content["seeds"])

    @property
    def tuned(self) -> bool:
        """Whether hyper-parameters were chosen on validation data; otherwise every configuration is final."""
        return self.content["study"].get("tune") is not None

    @property
    def selection(self) -> list[Mapping[str, Any]]:
        """The trials: condition, method, choice, score, chosen, and the counts of runs without a score."""
        return list(self.content["selection"])

    @cached_property
    def baseline(self) -> str | None:
        """The method that others are compared with: ``lora``, or else the one that trains LoRA plainly."""
        if "lora" in self.methods:
            return "lora"
        plain = self.table[(self.table["optimizer"] == "plain") & (self.table["adapter"] == "lora")]
        return next((name for name in self.methods if name in set(plain["method"])), None)

    @cached_property
    def final(self) -> pd.DataFrame:
        """The final runs with what follows from their results, in the study's order.

        Beside the table's columns: ``configuration`` (the hyper-parameters as one text), ``test``,
        ``validation`` and ``train`` (the main metric on each split), ``gap`` (train − test metric),
        ``loss_gap`` (test − train loss), ``step_ms`` and ``time_ratio`` (median time per step, and its ratio
        to the baseline's run with the same seed and condition; NaN where there is none).
        """
        final = _with_labels(self.table, "final", self)
        for split in ("test", "validation", "train"):
            final[split] = _main_metric(final, split)
        final["gap"] = final["train"] - final["test"]
        final["loss_gap"] = _numbers(final, "test.loss") - _numbers(final, "train.loss")
        final["step_ms"] = _first(final, self.columns("step_ms"))
        final["time_ratio"] = _paired_ratio(final, "step_ms", self.baseline)
        final["total_time_ratio"] = _paired_ratio(final, self.column("train_seconds"), self.baseline)
        return final

    @cached_property
    def representatives(self) -> pd.DataFrame:
        """The final runs of one configuration of every condition and method: the one that was tuned, or of
        several final ones the one with the best mean validation metric, or validation loss where the metric
        is known for the test set only. One that lost a seed comes after all that lost none."""
        final = self.final
        keys = ["condition", "method", "configuration"]
        scores = final["validation"]
        known = scores.notna().groupby(final["condition"]).transform("any")
        scores = scores.where(known, -_numbers(final, "validation.loss"))
        grouped = final.assign(score=scores).groupby(keys, sort=False)["score"]
        means = grouped.agg(["mean", "count", "size"]).reset_index()
        means["mean"] = means["mean"].map(rounded)
        means["whole"] = means["count"] == means["size"]
        order = ["whole", "mean"]
        best = means.sort_values(order, ascending=False, kind="stable", na_position="last")
        best = best.drop_duplicates(["condition", "method"])
        chosen = pd.MultiIndex.from_frame(best[keys])
        return final[pd.MultiIndex.from_frame(final[keys]).isin(chosen)].reset_index(drop=True)

    def columns(self, value: str) -> list[str]:
        """Columns ``<measure label>.<value>`` of the table, in its order."""
        pairs = [(c, *c.partition(".")[::2]) for c in map(str, self.table.columns)]
        return [c for c, label, name in pairs if name == value and label not in _OWN]

    def column(self, value: str) -> str | None:
        """The first of `columns`, or None."""
        return next(iter(self.columns(value)), None)

    def constant(self, label: str, value: str) -> Any:
        """What all runs agree on for a measure, such as its ``space``; None if they do not."""
        column = f"{label}.{value}"
        found: Any = self.table[column].dropna().unique() if column in self.table else []
        return found[0] if len(found) == 1 else None


def _with_labels(table: pd.DataFrame, stage: str, results: Results) -> pd.DataFrame:
    """The runs of one stage, sorted by condition, method and configuration in the study's order."""
    chosen = table[(table["stage"] == stage) & (table["state"] != "damaged")].copy()
    chosen["seed"] = chosen["seed"].astype(int)  # floats, where a damaged run has lost its own
    chosen["configuration"] = configurations(chosen)
    order = {name: i for i, name in enumerate(results.methods)}
    places = {label: i for i, label in enumerate(results.conditions)}
    first = {name: i for i, name in enumerate(dict.fromkeys(chosen["configuration"]))}
    keys = pd.DataFrame(
        {
            "condition": chosen["condition"].map(places),
            "method": chosen["method"].map(order),
            "configuration": chosen["configuration"].map(first),
            "seed": chosen["seed"],
        }
    )
    return chosen.loc[keys.sort_values([*keys.columns], kind="stable").index].reset_index(drop=True)


def configurations(table: pd.DataFrame) -> list[str]:
    """Each run's hyper-parameters as one text, such as ``lr 0.01, rho 0.1``."""
    columns = [c for c in table.columns if str(c).startswith("hyper.")]
    names = [c.removeprefix("hyper.") for c in columns]
    return [
        hyper_text(dict(zip(names, row, strict=True)))
        for row in table[columns].itertuples(index=False, name=None)
    ]


def _numbers(table: pd.DataFrame, column: str) -> pd.Series[float]:
    """A column as floats; NaN where it is absent."""
    if column not in table:
        return pd.Series(float("nan"), index=table.index, dtype=float)
    return pd.to_numeric(table[column], errors="coerce").astype(float)


def _main_metric(table: pd.DataFrame, split: str) -> pd.Series[float]:
    """Each run's own main metric on a split: conditions may be different tasks."""
    found = pd.Series(float("nan"), index=table.index, dtype=float)
    for metric in table["metric"].dropna().unique():
        rows = table["metric"] == metric
        found[rows] = _numbers(table, f"{split}.{metric}")[rows]
    return found


def _first(table: pd.DataFrame, columns: Sequence[str]) -> pd.Series[float]:
    return _numbers(table, columns[0] if columns else "")


def _paired_ratio(table: pd.DataFrame, column: str | None, baseline: str | None) -> pd.Series[float]:
    """A column over the baseline's, of the same condition and seed.

    Where the baseline has several configurations, over their geometric mean.
    """
    values = _numbers(table, column or "")
    own = table["method"] == baseline if baseline else pd.Series(False, index=table.index)
    if not own.any():
        return pd.Series(float("nan"), index=table.index, dtype=float)
    logs = pd.Series(np.log(values.where(values > 0)), index=table.index)
    reference = logs[own].groupby([table["condition"][own], table["seed"][own]]).mean()
    keys = pd.MultiIndex.from_frame(table[["condition", "seed"]])
    ratios = pd.Series(np.exp(logs - reference.reindex(keys).to_numpy()), index=table.index)
    # one configuration: the ratio of a run to itself is exactly one
    return ratios.where(~own | (table["configuration"][own].nunique() > 1), values / values)
