"""A study's folder: study.json and the run directories."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from flatbench.errors import InputError
from flatbench.store.content import problem as content_problem
from flatbench.store.files import read_json, storage_error, write_json
from flatbench.store.run_directory import RunDirectory, digest


class StudyFolder:
    """The results of one study."""

    def __init__(self, results: Path, study: str) -> None:
        self.path = Path(results) / study
        self.file = self.path / "study.json"
        self._runs = f"{self.path}/runs"  # thousands of paths below it are made

    def exists(self) -> bool:
        """Whether a study's results are here."""
        return self.file.is_file() or next((self.path / "runs").glob("*/run.json"), None) is not None

    def run(self, run: str) -> RunDirectory:
        """The directory of a run by its id."""
        return RunDirectory(Path(f"{self._runs}/{run}"))

    def prepare(self) -> None:
        """Make the folder. Raises InputError if that cannot be."""
        try:
            (self.path / "runs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def write(self, content: Mapping[str, Any]) -> None:
        """Write study.json, with a checksum of what it says, unless it says the same already."""
        whole = {**content, "sha256": digest(content)}
        with contextlib.suppress(InputError):  # a damaged one is written anew
            if self.file.is_file() and read_json(self.file) == whole:
                return
        write_json(self.file, whole)

    def read(self) -> dict[str, Any]:
        """study.json, or what the run directories tell of it if it is not there.

        Raises InputError if the study has no results here.
        """
        if not self.file.is_file():
            from flatbench.store.index import rebuilt

            content = rebuilt(self.path.name, self.path / "runs")
            if content is not None:
                return content
            raise InputError(
                f"{self.path}: no results of a study here; make them with `flatbench run`, or name their "
                "folder with --results"
            )
        problem = None
        try:
            found: Any = read_json(self.file)
        except InputError as error:
            problem = str(error).removeprefix(f"{self.file}: damaged ").strip("()")
        else:
            if not isinstance(found, dict) or not isinstance(found.get("runs"), list):
                problem = "it lists no runs"
            elif "sha256" in found:
                if found.pop("sha256") != _digest(found):
                    problem = "it is not as it was written"
            else:  # of an earlier version
                problem = content_problem(found) or None
        if problem is not None:
            raise InputError(
                f"{self.file}: damaged ({problem}); make it anew with `flatbench run`, or remove it "
                "and have the run directories read instead"
            )
        return dict(found)

    def places(
        self, content: Mapping[str, Any] | None = None, runs: Collection[str] | None = None
    ) -> list[tuple[dict[str, Any], RunDirectory]]:
        """Every place in the study, in the study's order, with the run that fills it.

        A place has ``id``, ``stage``, ``condition``, ``method`` and ``hyper``; places that are configured
        alike share a run.

        Args:
            content: what `read` gave, if it was read already.
            runs: the runs that are wanted; all if None.
        """
        listed = [
            (place, _check_run_id(place, self.file))
            for place in (self.read() if content is None else content)["runs"]
        ]
        return [(place, self.run(run)) for place, run in listed if runs is None or run in runs]

    def directories(self) -> list[RunDirectory]:
        """The directories of the study's runs, in the study's order."""
        listed = dict.fromkeys(_check_run_id(place, self.file) for place in self.read()["runs"])
        return [self.run(run) for run in listed]


def _check_run_id(place: Any, file: Path) -> str:
    """A run's name from a study's list. Raises InputError for what could lead elsewhere than to a run."""
    run = place.get("id") if isinstance(place, dict) else None
    if not isinstance(run, str) or not re.fullmatch(r"[0-9a-f]{16}", run):
        raise InputError(f"{file}: damaged (a run called {run!r}); make it anew with `flatbench run`")
    if not {"stage", "condition", "method", "hyper"} <= set(place):
        raise InputError(f"{file}: damaged (run {run} has no place); make it anew with `flatbench run`")
    return run


def _digest(content: Any) -> str | None:
    """`digest`; None for what no file of ours holds, numbers that are not finite."""
    try:
        return digest(content)
    except ValueError:
        return None
