"""A large study whose runs are listed in its results: told without its data, its models, and torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flatbench.cli import counts
from flatbench.config import study_files
from flatbench.config.validation import validated
from flatbench.errors import InputError, shown
from flatbench.estimate import earlier_runs
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study.schema import StudyFile

#: runs from which on a study is large: planning as many anew takes seconds
LARGE = 2000


def runs(study: str, overrides: Sequence[str], folder: StudyFolder) -> Group | None:
    """The runs of a study by stage, condition, method and state, and how long they take.

    None for a study that is not large, or of which another version, or none, was planned here; then its data
    and models have to be looked at.
    """
    content, source = study_files.read(study, overrides, unset=True)
    try:
        known = folder.read() if folder.file.is_file() else {}
        places = folder.places(known) if len(known.get("runs", ())) >= LARGE else []
    except InputError:
        return None
    if not places:
        return None
    try:
        file: StudyFile = validated(StudyFile, content, source)
    except InputError:  # reading it as a whole says what is wrong
        return None
    if known.get("study") != file.model_dump(mode="json"):
        return None
    kinds = [(str(place["stage"]), str(place["condition"]), str(place["method"])) for place, _ in places]
    states = {run.path.name: run.state() for run in dict.fromkeys(run for _, run in places)}
    table = counts.table((*kind, states[run.path.name]) for kind, (_, run) in zip(kinds, places, strict=True))
    decided = {kind[1:] for kind in kinds if kind[0] == "final"}
    waiting = len(file.seeds) * len({kind[1:] for kind in kinds} - decided)
    lines = [
        "these are the runs that `flatbench run` planned last; data and models are not looked at, which "
        "--runs does",
        *_durations(kinds, [(place, run) for place, run in places if states[run.path.name] == "done"]),
    ]
    return Group(told(file.name, file.description, table, waiting), *map(escape, lines))


def told(name: str, description: str, table: Table, waiting: int) -> Group:
    """A study's name, what it says of itself, and its runs."""
    about = shown(" ".join(description[:5000].split()), 1000)
    lines: list[Any] = [f"{name}: {escape(about)}".rstrip(": "), table]
    if waiting:
        lines.append(f"and {waiting:,} final runs, once hyper-parameters are chosen on validation data")
    return Group(*lines)


def _durations(
    kinds: Sequence[tuple[str, str, str]], done: Sequence[tuple[Mapping[str, Any], RunDirectory]]
) -> list[str]:
    tuning = sum(stage == "tune" for stage, _, _ in kinds)
    lines = [f"{len(kinds):,} runs: {tuning:,} tuning, {len(kinds) - tuning:,} final"]
    took = earlier_runs.seconds(done)
    times = [took.get((condition, method, stage)) for stage, condition, method in kinds]
    known = [seconds for seconds in times if seconds is not None]
    if known:
        least = "at least " if len(known) < len(times) else ""
        lines.append(
            f"{least}{duration(sum(known))} on this machine, one after the other, measures included (from "
            "earlier runs; within a factor of 2)"
        )
    return lines


def duration(seconds: float) -> str:
    """Seconds, minutes or hours.

    >>> [duration(seconds) for seconds in (0.3, 1, 4.2, 150, 7300, 3e6)]
    ['1 second', '1 second', '4 seconds', '2.5 minutes', '2 hours', '833 hours']
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            number = seconds / size
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.2g} {unit}"
    whole = max(round(seconds), 1)
    return f"{whole} second{'s' if whole > 1 else ''}"
