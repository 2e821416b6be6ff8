"""A study's results as one table, for notebooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from flatbench import store
from flatbench.config import study_files
from flatbench.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


def load_results(study: str | Path, results: str | Path = "results") -> pd.DataFrame:
    """The runs of a study that was run, a row a run.

    Args:
        study: a predefined study's name, a study file, or the folder of its results.
        results: where results are, as for `flatbench run --output`.

    Returns:
        The columns of `flatbench.store.table`, and ``path``, the run directory, for
        `flatbench.load_checkpoint`.

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
    return table
