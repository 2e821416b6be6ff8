"""Running a whole study: tuning runs, selection, final runs, measures."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatbench.config.hyper_parameters import hyper_text
from flatbench.errors import InputError
from flatbench.executors.base import Executor
from flatbench.orchestration.progress import Display, UnderWay
from flatbench.orchestration.queue import Drive
from flatbench.orchestration.stages import Here, Planner, Stage
from flatbench.runs import trackers
from flatbench.store import RunDirectory, StudyFolder, claims
from flatbench.store import notes as data_notes
from flatbench.store.files import read_json
from flatbench.study import Study


@dataclass
class Outcome:
    """What came of a study.

    Attributes:
        states: run id -> state.
        undecided: methods without final runs, because all their tuning runs failed.
        noted: notes on data that were shown.
    """

    folder: Path
    states: dict[str, str] = field(default_factory=dict)
    undecided: list[str] = field(default_factory=list)
    noted: set[str] = field(default_factory=set)

    @property
    def failed(self) -> bool:
        """Whether anything is missing from the study."""
        return bool(self.undecided) or any(state != "done" for state in self.states.values())

    def summary(self) -> str:
        """One line a person can read."""
        counts = {
            state: list(self.states.values()).count(state) for state in dict.fromkeys(self.states.values())
        }
        text = ", ".join(f"{count} {state}" for state, count in counts.items())
        if self.undecided:
            text += f"; no configuration of {', '.join(self.undecided)} could be chosen"
        return f"{len(self.states)} runs: {text}; results in {self.folder}"


def run(
    study: Study,
    folder: StudyFolder,
    executor: Executor,
    display: Display,
    fresh: bool = False,
) -> Outcome:
    """Run a study to its end: train every trial, choose, train the chosen ones, measure.

    Raises InputError for what is wrong with the study's input, before anything is trained.
    """
    return run_planned(Here(study, folder), Drive(executor), display, fresh)


def run_planned(planner: Planner, drive: Drive, display: Display, fresh: bool = False) -> Outcome:
    """Run a study as `run` does, by what a planner says and on a drive's executor."""
    planner.warm(drive.executor)
    outcome = Outcome(planner.folder.path)
    stage = planner.stage(last=False, fresh=fresh)
    _run_stage(stage, planner.folder, drive, display, outcome)
    if not stage.last:
        _run_stage(planner.stage(last=True), planner.folder, drive, display, outcome)
    return outcome


def _run_stage(stage: Stage, folder: StudyFolder, drive: Drive, display: Display, outcome: Outcome) -> None:
    for line in stage.lines:
        display.line(line)
    _say(stage.notes, display, outcome)
    outcome.states |= stage.states
    outcome.undecided += stage.undecided
    finished, count = len(stage.states) - len(stage.pending), len(stage.states)
    display.stage(stage.name, count, finished)
    version = _Version(folder, stage.study)
    drive.say = display.line
    with _Watch(display, lambda: drive.under_way, finished) as watch:
        for result in drive.run([folder.run(run).path for run in stage.pending]):
            outcome.states[result.path.name] = result.state
            watch.through()
            directory = RunDirectory(result.path)
            display.line(f"[{watch.done}/{count}] {_describe(directory)}")
            _say(_notes(directory), display, outcome)
            _say(version.other(), display, outcome)


def _say(notes: Sequence[str], display: Display, outcome: Outcome) -> None:
    """Each note once."""
    for note in notes:
        if note not in outcome.noted:
            outcome.noted.add(note)
            display.line(f"note: {note}")


def _describe(directory: RunDirectory) -> str:
    return _result_text(directory) + "".join(f"; {line}" for line in trackers.failures(directory))


def _result_text(directory: RunDirectory) -> str:
    spec = directory.spec()
    text = f"{_name(spec)}: "
    state = directory.state()
    if state in ("failed", "diverged"):
        return text + f"{state}: {read_json(directory.path / 'failure.json')['error']}"
    result = directory.result()
    if result is None:
        return text + state
    split = "test" if "test" in result["metrics"] else "validation"
    values = result["metrics"][split]
    metric = spec["metric"] if spec["metric"] in values else "loss"  # some are known for test sets only
    value = values[metric]
    shown = "undefined" if value is None else f"{value:.4f}"
    return text + f"{split} {metric} {shown}, {result['training']['train_seconds']:.1f} s"


def _notes(directory: RunDirectory) -> list[str]:
    """What a run notes, of its data above all, by condition."""
    condition = directory.spec()["condition"]
    found = data_notes.of_result(directory.result())
    return [f"{condition}: {note}" if condition else note for note in found]


def _name(spec: Mapping[str, Any]) -> str:
    return f"{spec['method']} seed {spec['config']['seed']} ({hyper_text(spec['hyper'])})"


class _Version:
    """Looks whether another `flatbench run` has put another version of the study in this one's place.

    Args:
        study: the study's sections as this process wrote them into study.json.
    """

    def __init__(self, folder: StudyFolder, study: Mapping[str, Any]) -> None:
        self.folder, self.study = folder, study
        self._last_modification = self._modification_time()

    def _modification_time(self) -> int | None:
        try:
            return self.folder.file.stat().st_mtime_ns
        except OSError:
            return None

    def other(self) -> list[str]:
        """What to say if it has, once for each time that study.json was written."""
        changed = self._modification_time()
        if changed in (None, self._last_modification):
            return []
        self._last_modification = changed
        with contextlib.suppress(InputError):
            if self.folder.read().get("study") != self.study:
                return [
                    f"{self.folder.path}: another version of this study is being run here as well; reports "
                    "show the version that is run last; use another --output to have both"
                ]
        return []


class _Watch:
    """Looks into the directories of runs under way, so that the display moves within long runs too."""

    def __init__(self, display: Display, under_way: Callable[[], Sequence[Path]], done: int) -> None:
        self.display, self.done = display, done
        self._under_way = under_way
        self._names: dict[Path, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def through(self) -> None:
        self.done += 1
        self.display.look(self.done, self._rows())

    def _rows(self) -> list[UnderWay]:
        rows = []
        for path in self._under_way():
            directory = RunDirectory(path)
            holder = claims.holder(path)
            if holder is None:
                continue
            if path not in self._names:
                self._names[path] = _name(directory.spec())
            rows.append(UnderWay(self._names[path], directory.progress(), time.time() - holder.since))
        return rows

    def _watch(self) -> None:
        pause = 0.5
        while not self._stop.wait(pause):
            began = time.monotonic()
            self.display.look(self.done, self._rows())
            # thousands of queued runs on a network file system take their time to look through
            pause = max(0.5, 20 * (time.monotonic() - began))

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
