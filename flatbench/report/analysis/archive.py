"""A study's results as parquet files that travel: a report can be made from them again, to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatbench import store
from flatbench.config import study_files
from flatbench.config.names import plain_name
from flatbench.errors import InputError
from flatbench.report.analysis.results import Results
from flatbench.store.content import problem as content_problem
from flatbench.store.files import read_parquet, replacing

if TYPE_CHECKING:
    import pandas as pd

#: the tidy table, a row a run; study.json, the environments and the names of the other files are in its
#: metadata
NAME = "results.parquet"
_KEY = b"flatbench"
_FORMAT = 1
#: what curves are drawn from, beside the table where there is any
_CURVES = ("history", "slices", "spectra")


def save(results: Results, folder: Path) -> list[str]:
    """Write ``results.parquet`` and the curves beside it; returns the names of the files.

    Equal results give equal bytes. Raises StorageError if the folder cannot be written.
    """
    curves = {name: frame for name in _CURVES if not (frame := getattr(results, name)).empty}
    content = {
        "content": results.content,
        "environments": results.environments,
        "curves": [*curves],
    }
    for name, frame in curves.items():
        _write(folder / f"{name}.parquet", frame, {})
    _write(folder / NAME, results.table, content)
    return [NAME, *(f"{name}.parquet" for name in curves)]


def load(path: Path) -> Results:
    """Read what `save` wrote.

    Args:
        path: ``results.parquet``, or the folder that holds it.

    Raises:
        InputError: no such file, not one of flatbench's, damaged, or a file of curves is missing beside it.
    """
    import pandas as pd

    path = path / NAME if path.is_dir() else path
    table, content = _read(path)
    wrong = content_problem(content.get("content"))
    if wrong:
        raise InputError(f"{path}: damaged (of the study, {wrong})")
    curves = {
        name: _read(path.with_name(f"{name}.parquet"))[0] if name in content["curves"] else pd.DataFrame()
        for name in _CURVES
    }
    return Results(table=table, content=content["content"], environments=content["environments"], **curves)


def open_results(study: str, results: Path = Path("results")) -> Results:
    """A study's results from wherever they are.

    Args:
        study: a study by its name or file, whose results are in ``results``; a folder of one study's results;
            a ``results.parquet`` or the folder of a report that holds one.

    Raises InputError if there are no results, or if their study's name could not be that of a folder.
    """
    path = Path(study)
    if path.suffix == ".parquet" or (path / NAME).is_file():
        found = load(path)
    elif (here := store.StudyFolder(path.parent, path.name)).exists():
        found = Results.load(here)
    else:
        found = Results.load(store.StudyFolder(results, study_files.name_of(study)))
    plain_name(found.name, f"{study}: name")  # it names the report's folder
    return found


def _write(path: Path, frame: pd.DataFrame, content: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    encoded = [c for c in frame.columns if frame[c].dtype == object and not _uniform(frame[c])]
    shown = frame.assign(**{c: _map_values(frame[c], json.dumps) for c in encoded})
    made = pyarrow.Table.from_pandas(shown, preserve_index=False)
    own = json.dumps({**content, "format": _FORMAT, "encoded": encoded}).encode()
    with replacing(path) as temporary:
        parquet.write_table(
            made.replace_schema_metadata({**(made.schema.metadata or {}), _KEY: own}), temporary
        )


def _read(path: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    import pyarrow

    try:
        frame, metadata = read_parquet(path)
        content = json.loads(metadata.get(_KEY, b"null"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, MemoryError, RecursionError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: damaged ({error})") from None
    if not isinstance(content, dict) or "format" not in content:
        raise InputError(f"{path}: not a results.parquet of flatbench (it names no study)")
    if content["format"] != _FORMAT:
        raise InputError(
            f"{path}: written in format {content['format']}, this flatbench reads {_FORMAT}; use the version "
            "that wrote it"
        )
    for column in content["encoded"]:
        frame[column] = _map_values(frame[column], json.loads)
    return frame, content


def _uniform(column: pd.Series[Any]) -> bool:
    """Whether a column of objects holds only texts, or only truth values, beside what is missing."""
    kinds = {type(value) for value in column if value is not None and value == value}
    return kinds <= {str} or kinds <= {bool}


def _map_values(column: pd.Series[Any], change: Callable[[Any], Any]) -> list[Any]:
    return [None if value is None or value != value else change(value) for value in column]
