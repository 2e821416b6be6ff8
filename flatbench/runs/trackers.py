"""Experiment trackers (TensorBoard, wandb, trackio, MLflow) by accelerate: written to, never read from."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flatbench import store
from flatbench.config.validation import as_mapping
from flatbench.errors import InputError, shown, suggest
from flatbench.security.secrets import names_a_secret, redacted
from flatbench.store import RunDirectory, events
from flatbench.store.files import read_mapping

#: holds the trackers as a JSON list; worker processes inherit it
VARIABLE = "FLATBENCH_TRACKERS"
#: in a run's directory: what each tracker was sent, so that nothing is sent twice
FILE = "trackers"

#: tracker -> options that it takes; None stands for whatever its own ``init`` takes
_OPTIONS: dict[str, tuple[str, ...] | None] = {
    "tensorboard": ("max_queue", "flush_secs", "filename_suffix"),
    "wandb": None,
    "trackio": None,
    "mlflow": ("experiment_name", "logging_dir", "tags", "nested_run", "description"),
}
#: what ties a tracker's run to ours
_RESERVED_OPTIONS = ("id", "name", "resume", "run_id", "run_name")

_log = logging.getLogger(__name__)


# -- which trackers there are -----------------------------------------------------------------------------


def choose(entries: Sequence[str | Mapping[str, Any]], source: str) -> None:
    """From now on, runs of this process and of those that it starts report to these trackers alone.

    Args:
        entries: names, or names and options of the tracker's own.
        source: the site file, for messages.

    Raises InputError for a tracker or an option that there is not, one that is not installed here, and for an
    option that would be a secret.
    """
    found = [_validate(entry, source, f"trackers[{i}]") for i, entry in enumerate(entries)]
    names = [one["name"] for one in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(f"{source}: trackers[{i}]: '{name}' stands in the list twice")
    if found:
        os.environ[VARIABLE] = json.dumps(found)
    else:
        os.environ.pop(VARIABLE, None)


def _validate(entry: str | Mapping[str, Any], source: str, where: str) -> dict[str, Any]:
    raw = as_mapping(entry, source, where)
    name = raw.get("name")
    if not isinstance(name, str) or name not in _OPTIONS:
        raise InputError(
            f"{source}: {where}: unknown tracker '{shown(name)}'; {suggest(str(name), _OPTIONS)}"
        )
    known = _OPTIONS[name]
    for key in (key for key in raw if key != "name"):
        if key in _RESERVED_OPTIONS:
            raise InputError(
                f"{source}: {where}.{key}: it is set by flatbench, to the run's own; leave it out"
            )
        if known is not None and key not in known:
            raise InputError(f"{source}: {where}.{shown(key)}: unknown key; {suggest(str(key), known)}")
    for place, key in _keys(raw, where):
        if names_a_secret(key):
            raise InputError(
                f"{source}: {place}: secrets do not belong in a site file; {name} takes them from its own "
                "environment variables or its login"
            )
    try:
        json.dumps(raw, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: {where}: not plain text, numbers and lists: {error}") from None
    if importlib.util.find_spec(name) is None:
        raise InputError(f"{source}: {where}: {name} is not installed here; pip install {name}")
    return raw


def _keys(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, key) of all keys inside."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{where}.{shown(key)}", str(key)
            yield from _keys(value, f"{where}.{shown(key)}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _keys(value, f"{where}[{i}]")


def chosen() -> list[dict[str, Any]]:
    """The trackers in use, as names and options. Raises InputError for a variable that is damaged."""
    try:
        found = json.loads(os.environ.get(VARIABLE, "[]"))
        known = all(one["name"] in _OPTIONS for one in found)
    except (ValueError, TypeError, KeyError):
        known = False
    if not known:
        raise InputError(f"${VARIABLE}: expected a JSON list of trackers, as a site file's `trackers`")
    return list(found)


def failures(directory: RunDirectory) -> list[str]:
    """What went wrong with the trackers of a run, a few words each."""
    if VARIABLE not in os.environ:
        return []
    return [
        f"{event['tracker']} failed: {event['error']}"
        for event in events.read(directory.path)
        if event["event"] == "tracker failed"
    ]


# -- telling them -----------------------------------------------------------------------------------------


class Trackers:
    """A run's trackers, each with one run of its own, which is called as ours is.

    It is opened when there is something to send. What it was sent is kept in the run's directory, so that a
    run that is resumed, and finds again what it had found, sends nothing twice. A tracker that fails is left
    alone from there on, which is said and recorded; the run goes on.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._run_trackers = [_RunTracker(directory, one) for one in chosen()]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._run_trackers:
            tracker.close()

    def rows(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Tell what is new in the history, which is given whole."""
        for tracker in self._run_trackers:
            tracker.rows(history)

    def result(self) -> None:
        """Tell the whole history, metrics, cost and measures of a run that is trained, from its directory."""
        for tracker in self._run_trackers:
            tracker.result()


class _RunTracker:
    """One tracker of one run.

    Attributes:
        known: what it was sent: its own ``id`` of the run, how many ``rows``, and which of the ``results``.
    """

    def __init__(self, directory: RunDirectory, options: Mapping[str, Any]) -> None:
        self.directory = directory
        self.name = options["name"]
        self.options = {key: value for key, value in options.items() if key != "name"}
        self.known: dict[str, Any] = {}
        self._tracker: Any = None
        self._failure = False

    def rows(self, history: Sequence[Mapping[str, Any]]) -> None:
        # a run that began anew has a shorter history than was sent
        if self._tracker is not None and len(history) <= self.known["rows"]:
            return
        if history and self._open():
            for row in history[self.known["rows"] :]:
                self._log_values(numbers(row), int(row["step"]))
            self._record(rows=max(len(history), self.known["rows"]))

    def result(self) -> None:
        if self._failure or not self._open():
            return
        frame = store.history_of(self.directory)
        self.rows([{str(key): value for key, value in row.items()} for row in frame.to_dict("records")])
        values = {k: v for k, v in final(self.directory).items() if k not in self.known["results"]}
        if values:
            self._log_values(values, int(frame["step"].max()) if len(frame) else 0)
            self._record(results=[*self.known["results"], *values])

    def _open(self) -> bool:
        """Open the tracker's run, or go on with it; False if it failed."""
        if self._tracker is None and not self._failure:
            self.known = _load_record(self.directory, self.name)
            new = not self.known
            self.known = {"id": None, "rows": 0, "results": [], **self.known}
            try:
                self._tracker = _start_tracker(self.name, self.options, self.directory, self.known["id"], new)
                if new:
                    self._tracker.store_init_configuration(configuration(self.directory.spec()))
                own = _own_id(self.name, self._tracker, self.directory)
            except Exception as error:
                self._fail(error)
            else:
                self._record(id=own)
        return not self._failure

    def _log_values(self, values: Mapping[str, float], step: int) -> None:
        if values and not self._failure:
            try:
                self._tracker.log(dict(values), step=step)
            except Exception as error:
                self._fail(error)

    def _record(self, **known: Any) -> None:
        if not self._failure:
            self.known |= known
            path = self.directory.path / f"{FILE}.json"
            others = read_mapping(path) if path.is_file() else {}
            self.directory.write(FILE, {**others, self.name: self.known})

    def _fail(self, error: Exception) -> None:
        text = redacted(f"{type(error).__name__}: {error}".partition("\n")[0])
        self._failure = True
        _log.warning("%s is told no more of this run: %s", self.name, text)
        events.record(self.directory.path, "tracker failed", tracker=self.name, error=text)

    def close(self) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.finish()
        except Exception as error:
            if not self._failure:
                self._fail(error)
        self._tracker = None


def _load_record(directory: RunDirectory, name: str) -> dict[str, Any]:
    """What a tracker was sent before; nothing if that cannot be read."""
    with contextlib.suppress(InputError):
        found = read_mapping(directory.path / f"{FILE}.json").get(name)
        if isinstance(found, dict):
            return found
    return {}


def _start_tracker(
    name: str, options: Mapping[str, Any], directory: RunDirectory, own: str | None, new: bool
) -> Any:
    """accelerate's tracker, started: a new run, or the one that it calls ``own``."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from flatbench.machine import random_streams

    PartialState()  # accelerate's log wants to know who is the main process
    kind, study = LOGGER_TYPE_TO_CLASS[name], directory.spec()["study"]
    if name == "tensorboard":
        folder = tensorboard_folder(directory)
        if new:  # what an earlier beginning of the same run had written
            shutil.rmtree(folder / directory.id, ignore_errors=True)
        made = kind(directory.id, folder, **options)
    elif name == "mlflow":
        made = kind(**{"experiment_name": study, **options}, run_id=own, run_name=directory.id)
    else:
        given = {"project": study, **options}
        ours = {"name": directory.id, "resume": "never" if new else "allow"}
        if name == "wandb":
            ours |= {"id": own or f"{directory.id}-{os.urandom(3).hex()}"}
        made = kind(given.pop("project"), **given, **ours)
    random = random_streams.state()  # nobody promises to leave them alone
    try:
        made.start()
    finally:
        random_streams.restore(random)
    return made


def _own_id(name: str, tracker: Any, directory: RunDirectory) -> str:
    if name == "mlflow":
        return str(tracker.tracker.info.run_id)
    return str(tracker.tracker.id) if name == "wandb" else directory.id


def tensorboard_folder(directory: RunDirectory) -> Path:
    """Where a study's runs are shown from: ``tensorboard --logdir RESULTS/STUDY/tensorboard``."""
    return directory.path.parent.parent / "tensorboard"


# -- what they are sent -----------------------------------------------------------------------------------


def configuration(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run's specification by dotted names, as trackers take it: texts, numbers and switches alone."""
    told: dict[str, Any] = {"study": spec["study"], "method": spec["method"], "condition": spec["condition"]}
    _flatten(spec["config"], "", told)
    return {key: redacted(value) if isinstance(value, str) else value for key, value in told.items()}


def _flatten(node: Mapping[str, Any], place: str, told: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, Mapping):
            _flatten(value, f"{place}{key}.", told)
        elif isinstance(value, bool | int | float | str):
            told[f"{place}{key}"] = value
        elif value is not None:
            told[f"{place}{key}"] = json.dumps(value)


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A history's row in groups: ``train/loss``, ``validation/accuracy``, ``hessian_merged/eigenvalue_1``."""
    told = {}
    for key, value in row.items():
        if key != "step" and _is_number(value):
            group, dot, name = key.partition(".")
            told[f"{group}/{name}" if dot else f"train/{key}"] = value
    if "train/loss" not in told:  # an evaluation's row; that of the same step has told its epoch
        told.pop("train/epoch", None)
    return told


def final(directory: RunDirectory) -> dict[str, float]:
    """The numbers that a trained run found, as in the results table: ``final/test.accuracy``, …"""
    found: dict[str, Any] = {}
    for split, values in (directory.result() or {}).get("metrics", {}).items():
        found |= {f"final/{split}.{name}": value for name, value in values.items()}
    for label, stored in directory.measures().items():
        found |= {f"final/{label}.{name}": value for name, value in stored.get("values", {}).items()}
    return {key: value for key, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
