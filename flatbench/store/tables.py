"""Tables over a study's run directories: a row a run, a logging step, a point of a slice."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatbench.errors import InputError
from flatbench.store import notes as data_notes
from flatbench.store.files import read_mapping, read_parquet
from flatbench.store.row_cache import RowCache
from flatbench.store.run_directory import RunDirectory
from flatbench.store.study_folder import StudyFolder

if TYPE_CHECKING:
    import pandas as pd

Entries = Mapping[str, Mapping[str, Any]]


def table(folder: StudyFolder, read: Entries | None = None) -> pd.DataFrame:
    """One row a place of the study: labels, state, hyper-parameters, results and measures.

    Columns: run, study, condition, method, optimizer, adapter, stage, seed, state, metric, error,
    ``hyper.*``, ``train.*``, ``validation.*``, ``test.*`` and ``<measure label>.<value>``; ``data.notes``,
    lines on what the task cut or left out, where there is any. A run whose files are damaged has the state
    ``damaged``, what is wrong as ``error``, and no results.

    Args:
        read: what `entries` gave, if it was read already.
    """
    import pandas as pd

    found, rows = entries(folder) if read is None else read, []
    for place, directory in folder.places():
        own = {"stage": place["stage"], **found[directory.id]["row"]}
        labels = {"run": own.pop("run"), "study": own.pop("study")}
        labels |= {"condition": place["condition"], "method": place["method"]}
        rows.append({**labels, **own, **{f"hyper.{key}": value for key, value in place["hyper"].items()}})
    return pd.DataFrame(rows)


def entries(folder: StudyFolder) -> Entries:
    """Run id -> what the table shows of it wherever it stands (``row``), and its ``environment``."""
    cache = RowCache(folder.path, _entry)
    found = {directory.id: cache.row(directory.path, directory.seal()) for directory in folder.directories()}
    cache.save()
    return found


def _entry(path: Path) -> dict[str, Any]:
    directory = RunDirectory(path)
    try:
        with _readable(path):
            if problem := directory.damage_text():
                raise InputError(f"{path}: {problem}")
            return {"row": _row(directory), "environment": directory.environment()}
    except InputError as error:
        return {"row": _damaged_row(directory, str(error).removeprefix(f"{path}: ")), "environment": None}


def _damaged_row(directory: RunDirectory, error: str) -> dict[str, Any]:
    """What is known of a run whose files are damaged: what it was to be, if its run.json is whole."""
    known = {"run": directory.id, "study": directory.path.parent.parent.name}
    row = {**dict.fromkeys(_LABELS), **known, "state": "damaged", "error": error}
    with contextlib.suppress(InputError, KeyError, TypeError):
        row = {**_labels_of(directory.spec(), directory.id), **known, "state": "damaged", "error": error}
    return row


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that is JSON, but not what this package writes there, is damaged input and no bug."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: damaged (a file in it is not as it was written; {problem})") from error


def _row(directory: RunDirectory) -> dict[str, Any]:
    spec = directory.spec()
    row = _labels_of(spec, directory.id)
    row |= {"state": directory.state(), "error": None}
    if row["state"] in ("failed", "diverged"):
        row["error"] = read_mapping(directory.path / "failure.json", "error")["error"]
    result = directory.result() or {}
    for split, values in result.get("metrics", {}).items():
        row |= {f"{split}.{name}": value for name, value in values.items()}
    if said := data_notes.of_result(result):
        row["data.notes"] = "\n".join(said)
    for label, stored in directory.measures().items():
        if other := _other_options(spec["measures"].get(label) or {}, stored.get("config") or {}):
            row[f"{label}.skipped"] = f"taken with {other}; `flatbench run` takes it as the study asks"
            continue
        if "skipped" in stored:
            row[f"{label}.skipped"] = stored["skipped"]
        for name, value in stored.get("values", {}).items():
            if not isinstance(value, list | dict):
                row[f"{label}.{name}"] = value
    return row


def _other_options(wanted: Mapping[str, Any], taken: Mapping[str, Any]) -> str:
    """Options of a stored measure that are not the study's: its values are no others' to be compared with.

    Options that came after a measure was taken are not among them.
    """
    differing = [key for key in wanted if key in taken and taken[key] != wanted[key]]
    return ", ".join(f"{key} {taken[key]} where the study says {wanted[key]}" for key in differing)


_LABELS = ("run", "study", "optimizer", "adapter", "stage", "seed", "state", "metric", "error")


def _labels_of(spec: Mapping[str, Any], run: str) -> dict[str, Any]:
    config = spec["config"]
    return {
        "run": run,
        "study": spec["study"],
        "optimizer": config["optimizer"]["name"],
        "adapter": config["adapter"]["name"],
        "stage": config["stage"],
        "seed": config["seed"],
        "state": None,
        "metric": spec["metric"],
        "error": None,
    }


def history_of(directory: RunDirectory) -> pd.DataFrame:
    """One run's history; empty if it has none yet. Raises InputError if the file is damaged."""
    import pandas as pd

    path = directory.path / "history.parquet"
    if not path.is_file():
        return pd.DataFrame()
    try:
        return read_parquet(path)[0]
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(f"{path}: damaged ({error})") from None


def _labels(place: Mapping[str, Any], directory: RunDirectory) -> dict[str, Any]:
    """What rows of a history or a slice say about their run."""
    labels = {"run": directory.id, **{key: place[key] for key in ("method", "condition", "stage")}}
    return {**labels, "seed": directory.spec()["config"]["seed"]}


def history(folder: StudyFolder, runs: Collection[str] | None = None) -> pd.DataFrame:
    """The histories of a study's runs, under each other, with their labels; of those in ``runs`` if given."""
    import pandas as pd

    frames = [
        frame.assign(**_labels(place, directory))
        for place, directory in _select_places(folder, runs)
        if not (frame := history_of(directory)).empty
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _select_places(
    folder: StudyFolder, runs: Collection[str] | None
) -> list[tuple[dict[str, Any], RunDirectory]]:
    """Those of ``runs``, and of them those that are not damaged."""
    return [place for place in folder.places(runs=runs) if place[1].state() != "damaged"]


def slices(folder: StudyFolder, runs: Collection[str] | None = None) -> pd.DataFrame:
    """Every stored loss slice, a row a point: labels of its run, label, direction, position, loss."""

    def points(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for direction, losses in enumerate(values.get("losses", ())):
            for position, loss in zip(values["positions"], losses, strict=True):
                yield {"direction": direction, "position": position, "loss": loss}

    return _points(folder, runs, points)


def spectra(folder: StudyFolder, runs: Collection[str] | None = None) -> pd.DataFrame:
    """Every stored spectral density, a row a point: labels of its run, label, eigenvalue, density and its
    95 % band ``lower``, ``upper``, and ``width``, the smoothing's standard deviation."""

    def points(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        names = ("eigenvalues", "density", "density_lower", "density_upper")
        for row in zip(*(values.get(name, ()) for name in names), strict=True):
            yield dict(zip(("eigenvalue", "density", "lower", "upper"), row, strict=True)) | {
                "width": values["width"]
            }

    return _points(folder, runs, points)


def _points(
    folder: StudyFolder,
    runs: Collection[str] | None,
    points: Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]],
) -> pd.DataFrame:
    """The points of the runs' measures under each other, with the labels of their run and measure."""
    import pandas as pd

    rows = []
    for place, directory in _select_places(folder, runs):
        for label, stored in directory.measures().items():
            with _readable(directory.path):
                found = list(points(stored.get("values", {})))
                if found:
                    own = {**_labels(place, directory), "label": label}
                    rows += [{**own, **point} for point in found]
    return pd.DataFrame(rows)


def environments(folder: StudyFolder, read: Entries | None = None) -> list[dict[str, Any]]:
    """Where runs were trained: every distinct environment.json, and under ``runs`` the ids of its runs.

    Args:
        read: what `entries` gave, if it was read already.
    """
    found: dict[str, dict[str, Any]] = {}
    for entry in (entries(folder) if read is None else read).values():
        environment = entry["environment"]
        if environment is not None:
            key = json.dumps(environment, sort_keys=True)
            found.setdefault(key, {**environment, "runs": []})["runs"].append(entry["row"]["run"])
    return list(found.values())
