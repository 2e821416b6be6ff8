"""A study's results as one table, with the directory of every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from flatbench import store
from flatbench.config import study_files
from flatbench.errors import InputError


class Runs(pd.DataFrame):
    """A row a run: a DataFrame that knows which of its runs are final, and which of them is the best."""

    @property
    def _constructor(self) -> type[Runs]:
        return Runs

    @property
    def final(self) -> Runs:
        """The final runs that are trained: those that a report is made of."""
        chosen: Runs = self[(self["stage"] == "final") & (self["state"] == "done")]
        return chosen.reset_index(drop=True)

    def best(self, method: str | None = None) -> pd.Series[Any]:
        """The final run with the highest validation metric: its row, with its directory as ``path``.

        Where the metric is known for the test set only (of generated texts), that with the lowest validation
        loss.

        Args:
            method: among this method's runs; of all methods if None.

        Raises:
            InputError: no such run.
        """
        runs = self.final
        if method is not None:
            runs = runs[runs["method"] == method]
        scores = pd.Series(
            [row.get(f"validation.{row['metric']}") for row in runs.to_dict("records")],
            runs.index,
            dtype=float,
        )
        if not scores.notna().any() and "validation.loss" in runs:
            scores = -runs["validation.loss"].astype(float)
        if not scores.notna().any():
            known = ", ".join(dict.fromkeys(self.final["method"])) or "none"
            which = f" of {method}" if method is not None else ""
            raise InputError(
                f"no final run{which} with a validation metric; methods with final runs: {known}"
            )
        best: pd.Series[Any] = runs.iloc[int(scores.argmax())]
        return best


def load_results(study: str | Path, results: str | Path = "results") -> Runs:
    """The runs of a study that was run, a row a run, trained final runs first.

    Args:
        study: a predefined study's name, a study file, or the folder of its results.
        results: where results are, as for `flatbench run --output`.

    Returns:
        The columns of `flatbench.store.table`, and ``path``, the run directory, for
        `flatbench.load_checkpoint`. ``final`` are the final runs alone, ``best()`` is the one with the
        highest validation metric.

    Raises:
        InputError: no results of this study here.
    """
    path = Path(study)
    folder = store.StudyFolder(path.parent, path.name)
    if not folder.exists():
        if path.is_dir():
            raise InputError(f"{path}: no results of a study here (neither study.json nor runs)")
        folder = store.StudyFolder(Path(results), study_files.name_of(str(study)))
    table = store.table(folder)
    table["path"] = [str(folder.path / "runs" / run) for run in table["run"]]
    # the stages are sorted so that what a study is about comes before what chose it, done before anything
    # else
    place = 2 * (table["stage"] != "final").astype(int) + (table["state"] != "done").astype(int)
    return Runs(table.loc[place.sort_values(kind="stable").index].reset_index(drop=True))
