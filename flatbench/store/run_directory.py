"""One run's folder, by what lies in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatbench.errors import InputError, shown
from flatbench.security.secrets import redacted_all
from flatbench.store import checksums, values
from flatbench.store.files import (
    TEMPORARY,
    delete,
    read_json,
    read_mapping,
    read_regular,
    remove,
    replacing,
    write_json,
)

if TYPE_CHECKING:
    from flatbench.store.claims import Claim

#: part of every run's identity; raised when the same configuration would train differently
FORMAT = 1
_STATE, _PREVIOUS_STATE = "state.safetensors", "state.previous.safetensors"
_STATE_FILES = {_STATE, _PREVIOUS_STATE}


#: of run.json, what the run's id does not vouch for
_BESIDE: dict[str, type] = {"study": str, "condition": str, "method": str, "hyper": dict, "measures": dict}


def digest(content: Any) -> str:
    """Hex SHA-256 of a JSON-able value, the same for equal values."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class RunDirectory:
    """One run's folder, by what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path if isinstance(path, Path) else Path(path)
        #: this process's claim, without which nothing more is written once another process has taken over
        self.claim: Claim | None = None

    # made when they are asked for: thousands of directories are only looked at
    @property
    def adapter(self) -> Path:
        """Where what was trained lies."""
        return self.path / "adapter"

    @property
    def state_file(self) -> Path:
        """What resuming the training needs."""
        return self.path / _STATE

    @property
    def previous_state_file(self) -> Path:
        """What came before that, in case it is damaged."""
        return self.path / _PREVIOUS_STATE

    @property
    def id(self) -> str:
        """The run's name: the first 16 hex digits of its identity's hash."""
        return self.path.name

    def spec(self) -> dict[str, Any]:
        """run.json. Raises InputError if this is no run directory."""
        path = f"{self.path}/run.json"
        if not os.path.lexists(path):
            raise InputError(f"{self.path}: not a run directory (it holds no run.json)")
        spec = read_json(path)
        if not isinstance(spec, dict) or run_id(spec.get("config"), spec.get("data")) != self.id:
            raise InputError(f"{self.path / 'run.json'}: does not belong to the run that its folder names")
        for key, kind in _BESIDE.items():
            if not isinstance(spec.get(key, kind()), kind):
                raise InputError(f"{self.path / 'run.json'}: damaged ({key} is {shown(repr(spec[key]))})")
        measures = spec.setdefault("measures", {}).values()
        if not all(isinstance(config, dict) and isinstance(config.get("name"), str) for config in measures):
            raise InputError(f"{self.path / 'run.json'}: damaged (a measure without a name)")
        return spec

    def prepare(self, spec: Mapping[str, Any]) -> None:
        """Write run.json unless it says the same already."""
        path = self.path / "run.json"
        with contextlib.suppress(InputError):  # a damaged one is written anew
            if path.is_file() and read_json(path) == spec:
                return
        write_json(path, spec)
        self._seal_anew("run")

    def state(self) -> str:
        """One of planned, interrupted, trained, done, diverged, failed, damaged."""
        try:
            there = set(os.listdir(self.path))
        except OSError:
            there = set()
        # most of thousands of runs wait: their files are not looked for one by one
        if there & {"done.json", "failure.json", "result.json", "environment.json"} and self.damage():
            return "damaged"
        if "done.json" in there:
            return "done"
        if "failure.json" in there:
            return str(read_mapping(self.path / "failure.json").get("state", "failed"))
        if "result.json" in there:
            return "trained"
        return "interrupted" if there & _STATE_FILES else "planned"

    def damage(self) -> dict[str, str]:
        """What is wrong with the run's files: path within the run -> what; empty if nothing is.

        A finished run is held against the checksums in its done.json; one that an earlier version finished,
        or that is not finished, can only be read and looked at.
        """
        try:
            done = self._read_done()
            if done and "files" in done:
                return checksums.differences(self.path, done["files"])
        except InputError as error:
            return {"done.json": _reason(error)}
        found = {}
        if done is not None and not (self.path / "result.json").is_file():
            found["result.json"] = "is missing"
        for name in ("result", "environment", "failure"):
            try:
                self.result() if name == "result" else self._mapping(name)
            except InputError as error:
                found[f"{name}.json"] = _reason(error)
        return found

    def seal(self) -> bytes | None:
        """done.json of a finished run whose files are as they were written; None for any other."""
        try:
            content = read_regular(self.path / "done.json")
        except OSError:
            return None
        return content if b'"files"' in content and not self.damage() else None

    def damage_text(self) -> str:
        """`damage` in one line."""
        return "; ".join(f"{name} {what}" for name, what in sorted(self.damage().items()))

    def _read_done(self) -> dict[str, Any] | None:
        return self._mapping("done")

    def _mapping(self, name: str) -> dict[str, Any] | None:
        path = f"{self.path}/{name}.json"
        return read_mapping(path) if os.path.lexists(path) else None

    def finish(self, measures: Iterable[str]) -> None:
        """Write done.json, with a checksum of every file of the run."""
        files = {name: checksums.of_file(self.path / name) for name in checksums.files_of(self.path)}
        self.write("done", {"measures": sorted(measures), "files": files})

    def _seal_anew(self, name: str) -> None:
        """Renew a file's checksum in the done.json of a finished run."""
        with contextlib.suppress(InputError):  # a damaged one is not made whole by this
            done = self._read_done()
            if done and isinstance(done.get("files"), dict):
                done["files"][f"{name}.json"] = checksums.of_file(self.path / f"{name}.json")
                write_json(self.path / "done.json", done, durable=True)

    def heal(self) -> dict[str, str]:
        """Remove what is damaged, and with it what cannot stand without it; returns what was damaged.

        Measures are taken anew from the trained weights. Where a result, a history or weights are damaged,
        the run is trained anew.
        """
        broken = self.damage()
        if not broken:
            return broken
        if all(name.startswith("measures/") or name in ("done.json", "failure.json") for name in broken):
            self.forget("done")  # first: what is cleared by halves must not look finished
            for name in broken:
                delete(self.path / name)
        elif set(broken) == {"run.json"}:
            self.spec()  # `prepare` wrote it anew, or it is refused here
            self._seal_anew("run")
        else:
            self.clear()
        return broken

    def settled(self) -> bool:
        """Whether nothing is left to do: done and measured, or failed."""
        state = self.state()
        if (
            state != "done"
        ):  # run.json is read for finished runs only: thousands that wait are looked at often
            return state in ("diverged", "failed")
        return not self.pending_measures(self.spec())

    def complete(self, spec: Mapping[str, Any]) -> bool:
        """Whether the run is done and has every measure that its run.json asks for."""
        return self.state() == "done" and not self.pending_measures(spec)

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while the run is not trained."""
        path = self.path / "result.json"
        if not os.path.lexists(path):
            return None
        content = read_json(path)
        if not isinstance(content, dict) or not {"metrics", "training"} <= set(content):
            raise InputError(f"{path}: damaged (no result of a training)")
        values.check_metrics(content["metrics"], path)
        return content

    def trained_result(self) -> dict[str, Any]:
        """result.json. Raises InputError for a run that is not trained, which may be under way."""
        from flatbench.store.claims import holder

        found = self.result()
        if found is None and holder(self.path) is not None:
            raise InputError(f"{self.path}: this run is being trained now; wait until it is done")
        if found is None:
            raise InputError(f"{self.path}: this run is not trained yet ({self.state()}); finish it first")
        return found

    def measures(self) -> dict[str, dict[str, Any]]:
        """Label -> stored measure: {"config": …, "values": …} or {"config": …, "skipped": reason}.

        What was interrupted has ``"interrupted": true`` beside the values that it had found.
        """
        return {path.stem: _measure(path) for path in self._measure_files()}

    def _measure_files(self) -> list[Path]:
        return sorted(path for path in (self.path / "measures").glob("*.json") if path.name[0] != ".")

    def pending_measures(self, spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The measures that run.json asks for and that are not stored, readable, with the same options."""
        stored = {}
        for path in self._measure_files():
            with contextlib.suppress(InputError):
                stored[path.stem] = _measure(path)
        return {
            label: config
            for label, config in spec["measures"].items()
            if stored.get(label, {}).get("config") != config or stored[label].get("interrupted")
        }

    def environment(self) -> dict[str, Any] | None:
        """environment.json, or None before training began."""
        return self._mapping("environment")

    def check_claim(self) -> None:
        """Raise ClaimLostError if this process had claimed the run and another one has taken it over."""
        if self.claim is not None:
            self.claim.check()

    def sweep(self) -> None:
        """Remove what a process that was killed had begun to write, by this package or by safetensors."""
        for pattern in (f"{TEMPORARY}*", ".tmp*"):
            for path in [*self.path.rglob(pattern)]:
                remove(path)

    def write(self, name: str, content: Any) -> None:
        """Write one of the JSON files, ``name`` without its ending.

        Those that quote errors are written without secrets.
        """
        self.check_claim()
        if name in ("failure", "environment") or "skipped" in content:
            content = redacted_all(content)
        write_json(self.path / f"{name}.json", content, durable=name != "progress")
        if name.startswith("measures/"):
            self._seal_anew(name)

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Write history.parquet, a row a logging step or evaluation."""
        import pandas as pd

        self.check_claim()
        with replacing(self.path / "history.parquet", durable=True) as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)

    def forget(self, *names: str) -> None:
        """Remove JSON files that no longer hold true."""
        for name in names:
            delete(self.path / f"{name}.json")

    def forget_states(self) -> None:
        """Remove what resuming the training would need."""
        for path in (self.state_file, self.previous_state_file):
            delete(path)

    def clear(self) -> None:
        """Remove everything but run.json, so that the run starts anew."""
        # the marker goes first: a directory cleared by halves must not look finished
        self.forget("done")
        for path in (self.path / "measures", self.adapter):
            shutil.rmtree(path, ignore_errors=True)
        self.forget("result", "failure", "environment", "progress", "trackers")
        self.forget_states()
        for name in ("history.parquet", "events.jsonl", "run.log"):
            delete(self.path / name)

    def progress(self) -> float:
        """Share of the training that is done, from 0 to 1, as last reported by whoever trains."""
        try:
            fraction = float(json.loads(read_regular(self.path / "progress.json"))["fraction"])
            return fraction if 0 <= fraction <= 1 else 0.0
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0.0


def _measure(path: Path) -> dict[str, Any]:
    stored = read_mapping(path)
    values.check_measure(stored, path)
    return stored


def _reason(error: InputError) -> str:
    """What a message says after the file's name."""
    return str(error).partition(": ")[2] or str(error)


def run_id(config: Any, data: Any) -> str:
    """The name of a run: a hash of its resolved configuration and of its data's fingerprint."""
    return digest({"format": FORMAT, "config": config, "data": data})[:16]
