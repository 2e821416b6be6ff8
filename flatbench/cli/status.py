"""Progress of a study, read from its run directories: the state of every run and who works on it."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape

from flatbench.cli import counts, versions
from flatbench.config import study_files
from flatbench.config.hyper_parameters import hyper_text
from flatbench.config.words import condition_words
from flatbench.errors import InputError
from flatbench.orchestration import progress
from flatbench.store import RunDirectory, StudyFolder, claims, events
from flatbench.store.files import read_mapping

#: failures that are listed
_MOST_FAILURES = 10


@dataclass(frozen=True)
class RunStatus:
    """One run of a study.

    Attributes:
        state: one of `flatbench.cli.counts.STATES`; ``queued``: submitted to a cluster; ``interrupted``
            can be gone on with.
        fraction: share of the training that is done.
        host: the machine on which it runs; seconds: for how long it has, since it was last begun.
        deaths: how often a worker died under it.
    """

    id: str
    stage: str
    condition: str
    method: str
    seed: int
    hyper: dict[str, Any]
    state: str
    fraction: float
    deaths: int = 0
    host: str | None = None
    seconds: float | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Method, seed and hyper-parameters."""
        where = f" ({condition_words(self.condition)})" if self.condition else ""
        return f"{self.method}{where} seed {self.seed} ({hyper_text(self.hyper)})"

    def line(self) -> str:
        """The run as one line of JSON."""
        return json.dumps(asdict(self))


def look(study: str, results: Path) -> tuple[list[RunStatus], str]:
    """Every run of a study, and a line where its file is of another version than what ran.

    Raises InputError if the study has no results there.
    """
    folder = StudyFolder(results, study_files.name_of(study))
    content = folder.read()
    return survey(folder, content), versions.told(study, results, content.get("study"))


def survey(folder: StudyFolder, content: Mapping[str, Any] | None = None) -> list[RunStatus]:
    """Every run of a study, in the study's order.

    Args:
        content: what its `read` gave, if it was read already.

    Raises InputError if the study has no results there.
    """
    return [_status(place, directory) for place, directory in folder.places(content)]


def _status(place: dict[str, Any], directory: RunDirectory) -> RunStatus:
    known = {key: place[key] for key in ("stage", "condition", "method", "hyper")}
    try:
        state = directory.state()
        seed = int(directory.spec()["config"]["seed"])
    except (InputError, KeyError, TypeError, ValueError) as problem:
        error = str(problem) if isinstance(problem, InputError) else "run.json: damaged (it names no seed)"
        return RunStatus(id=directory.id, seed=-1, state="damaged", fraction=0.0, error=error, **known)
    found: dict[str, Any] = {}
    settled = state in ("done", "diverged", "failed")
    if state == "damaged":
        found["error"] = f"{directory.damage_text()}; `flatbench run` makes it anew"
    if state in ("diverged", "failed"):
        found["error"] = str(read_mapping(directory.path / "failure.json").get("error"))
    holder = None if settled else claims.holder(directory.path)
    if holder is not None:
        state = "running"
        found |= {"host": holder.host, "seconds": time.time() - holder.since}
    elif not settled and events.last(directory.path) == events.SUBMITTED:
        state = "queued"
    trained = settled or (state != "damaged" and directory.result() is not None)
    return RunStatus(
        id=directory.id,
        seed=seed,
        state=state,
        fraction=float(trained) or directory.progress(),
        deaths=events.count(directory.path, "worker died", "taken over"),
        **known,
        **found,
    )


def tables(runs: Sequence[RunStatus], note: str = "") -> Group:
    """How many runs are in which state, then the same by method and condition, runs under way, and
    failures; a note behind the first."""
    total = Counter(run.state for run in runs)
    listed = ", ".join(f"{total[state]} {state}" for state in counts.present_states(total))
    summary = counts.table((run.stage, run.condition, run.method, run.state) for run in runs)
    parts: list[Any] = [f"{len(runs)} runs: {listed}", *[escape(note)] * bool(note), "", summary]
    running = [run for run in runs if run.state == "running"]
    if running:
        rows = [
            progress.UnderWay(f"{run.id} {run.name} on {run.host}", run.fraction, run.seconds or 0.0)
            for run in running
        ]
        parts += ["", progress.table(rows)]
    failed = [run for run in runs if run.state in ("failed", "diverged", "damaged")]
    for run in failed[:_MOST_FAILURES]:
        parts.append(f"{run.state}: {run.id} {escape(run.name)}: {escape(str(run.error))}")
    if len(failed) > _MOST_FAILURES:
        parts.append(
            f"and {len(failed) - _MOST_FAILURES} more that failed, diverged or are damaged; --json lists them"
        )
    return Group(*parts)
