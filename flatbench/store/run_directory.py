"""One run's folder, by what lies in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatbench.errors import InputError
from flatbench.store.files import TEMPORARY, read_json, read_mapping, remove, replacing, write_json

if TYPE_CHECKING:
    from flatbench.store.claims import Claim

#: part of every run's identity; raised when the same configuration would train differently
FORMAT = 1


def digest(content: Any) -> str:
    """Hex SHA-256 of a JSON-able value, the same for equal values."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class RunDirectory:
    """One run's folder, by what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.adapter = self.path / "adapter"
        self.state_file = self.path / "state.safetensors"
        self.previous_state_file = self.path / "state.previous.safetensors"
        #: this process's claim, without which nothing more is written once another process has taken over
        self.claim: Claim | None = None

    @property
    def id(self) -> str:
        """The run's name: the first 16 hex digits of its identity's hash."""
        return self.path.name

    def spec(self) -> dict[str, Any]:
        """run.json. Raises InputError if this is no run directory."""
        if not (self.path / "run.json").is_file():
            raise InputError(f"{self.path}: not a run directory (it holds no run.json)")
        spec = read_json(self.path / "run.json")
        if not isinstance(spec, dict) or run_id(spec.get("config"), spec.get("data")) != self.id:
            raise InputError(f"{self.path / 'run.json'}: does not belong to the run that its folder names")
        return spec

    def prepare(self, spec: Mapping[str, Any]) -> None:
        """Write run.json unless it says the same already."""
        path = self.path / "run.json"
        if not path.is_file() or read_json(path) != spec:
            write_json(path, spec)

    def state(self) -> str:
        """One of planned, interrupted, trained, done, diverged, failed."""
        if (self.path / "done.json").is_file():
            return "done"
        if (self.path / "failure.json").is_file():
            return str(read_mapping(self.path / "failure.json").get("state", "failed"))
        if (self.path / "result.json").is_file():
            return "trained"
        begun = self.state_file.is_file() or self.previous_state_file.is_file()
        return "interrupted" if begun else "planned"

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
        if not path.is_file():
            return None
        content = read_json(path)
        if not isinstance(content, dict) or not {"metrics", "training"} <= set(content):
            raise InputError(f"{path}: damaged (no result of a training)")
        return content

    def measures(self) -> dict[str, dict[str, Any]]:
        """Label -> stored measure: {"config": …, "values": …} or {"config": …, "skipped": reason}.

        What was interrupted has ``"interrupted": true`` beside the values that it had found.
        """
        return {path.stem: read_mapping(path) for path in sorted((self.path / "measures").glob("*.json"))}

    def pending_measures(self, spec: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The measures that run.json asks for and that are not stored with the same options."""
        stored = self.measures()
        return {
            label: config
            for label, config in spec["measures"].items()
            if stored.get(label, {}).get("config") != config or stored[label].get("interrupted")
        }

    def environment(self) -> dict[str, Any] | None:
        """environment.json, or None before training began."""
        path = self.path / "environment.json"
        return read_mapping(path) if path.is_file() else None

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
        """Write one of the JSON files, ``name`` without its ending."""
        self.check_claim()
        write_json(self.path / f"{name}.json", content, durable=name != "progress")

    def write_history(self, rows: list[dict[str, Any]]) -> None:
        """Write history.parquet, a row a logging step or evaluation."""
        import pandas as pd

        self.check_claim()
        with replacing(self.path / "history.parquet", durable=True) as temporary:
            pd.DataFrame(rows).to_parquet(temporary, index=False)

    def forget(self, *names: str) -> None:
        """Remove JSON files that no longer hold true."""
        for name in names:
            (self.path / f"{name}.json").unlink(missing_ok=True)

    def forget_states(self) -> None:
        """Remove what resuming the training would need."""
        for path in (self.state_file, self.previous_state_file):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything but run.json, so that the run starts anew."""
        # the marker goes first: a directory cleared by halves must not look finished
        self.forget("done")
        for path in (self.path / "measures", self.adapter):
            shutil.rmtree(path, ignore_errors=True)
        self.forget("result", "failure", "environment", "progress", "trackers")
        self.forget_states()
        for name in ("history.parquet", "events.jsonl", "run.log"):
            (self.path / name).unlink(missing_ok=True)

    def progress(self) -> float:
        """Share of the training that is done, from 0 to 1, as last reported by whoever trains."""
        try:
            return float(json.loads((self.path / "progress.json").read_text())["fraction"])
        except (OSError, ValueError, KeyError):
            return 0.0


def run_id(config: Any, data: Any) -> str:
    """The name of a run: a hash of its resolved configuration and of its data's fingerprint."""
    return digest({"format": FORMAT, "config": config, "data": data})[:16]
