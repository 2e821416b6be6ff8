"""Running a whole study: tuning runs, selection, final runs, measures; and measuring what was run before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flatbench import study_files
from flatbench.errors import InputError
from flatbench.executors.base import Executor
from flatbench.files import read_json
from flatbench.plan import Plan, Run
from flatbench.progress import Display
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study import Study, resolve_measure


@dataclass
class Outcome:
    """What came of a study.

    Attributes:
        states: run id -> state.
        undecided: methods without final runs, because all their tuning runs failed.
    """

    folder: Path
    states: dict[str, str] = field(default_factory=dict)
    undecided: list[str] = field(default_factory=list)

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
    study: Study, folder: StudyFolder, executor: Executor, display: Display, fresh: bool = False
) -> Outcome:
    """Run a study to its end: train every trial, choose, train the chosen ones, measure.

    Raises InputError for what is wrong with the study's input, before anything is trained.
    """
    plan = Plan(study, folder)
    folder.prepare()
    if fresh:
        _forget(plan)
    outcome = Outcome(folder.path)
    if plan.tuning:
        _stage(f"{study.name}: tuning", plan.tuning, plan, executor, display, outcome)
    selection = plan.selection()
    for entry in selection:
        if entry["chosen"]:
            choice = ", ".join(f"{key} {value}" for key, value in entry["choice"].items())
            where = f"{entry['method']} ({entry['condition']})" if entry["condition"] else entry["method"]
            display.line(f"{where}: chosen on validation ({entry['score']:.4f}): {choice}")
    if plan.tuning:
        decided = {(e["condition"], e["method"]) for e in selection if e["chosen"]}
        every = dict.fromkeys((e["condition"], e["method"]) for e in selection)
        outcome.undecided = [f"{m} ({c})" if c else m for c, m in every if (c, m) not in decided]
    _stage(f"{study.name}: final", plan.final(selection), plan, executor, display, outcome)
    return outcome


def _forget(plan: Plan) -> None:
    """Clear the tuning runs first, while the final runs that they led to are still known."""
    for run in [*plan.final(plan.selection()), *plan.tuning]:
        plan.folder.run(run.id).clear()


def _stage(
    name: str, runs: Sequence[Run], plan: Plan, executor: Executor, display: Display, outcome: Outcome
) -> None:
    by_id = {run.id: run for run in runs}  # equal configurations are one run
    directories = {run_id: plan.folder.run(run_id) for run_id in by_id}
    pending = []
    for run_id, run in by_id.items():
        spec = run.spec()
        directories[run_id].prepare(spec)
        state = directories[run_id].state()
        outcome.states[run_id] = state
        if state == "diverged" or (state == "done" and not directories[run_id].pending_measures(spec)):
            continue
        pending.append(directories[run_id].path)
    _tell_what_drops_out(plan, display)
    plan.folder.write(plan.snapshot())
    finished = len(by_id) - len(pending)
    display.stage(name, len(by_id), finished)
    with _Watch(display, [RunDirectory(path) for path in pending], finished) as watch:
        for result in executor.run(pending):
            outcome.states[result.path.name] = result.state
            watch.through(result.path)
            display.line(
                f"[{watch.done}/{len(by_id)}] {_describe(by_id[result.path.name], RunDirectory(result.path))}"
            )
    plan.folder.write(plan.snapshot())


def _tell_what_drops_out(plan: Plan, display: Display) -> None:
    """Say so when the folder held another version of the study, whose runs a report no longer shows."""
    if not plan.folder.file.is_file():
        return
    before = {run.id for run in plan.folder.directories() if run.state() == "done"}
    now = {place["id"] for place in plan.snapshot()["runs"]}
    if before - now:
        display.line(
            f"{plan.folder.path} held another version of this study; {len(before - now)} finished runs are "
            "kept there, but are not a part of this version; use another --output to have both"
        )


def _describe(run: Run, directory: RunDirectory) -> str:
    hyper = ", ".join(f"{key} {value}" for key, value in run.hyper.items())
    text = f"{run.method} seed {run.config['seed']} ({hyper}): "
    state = directory.state()
    if state in ("failed", "diverged"):
        return text + f"{state}: {read_json(directory.path / 'failure.json')['error']}"
    result = directory.result()
    if result is None:
        return text + state
    split = "test" if "test" in result["metrics"] else "validation"
    values = result["metrics"][split]
    metric = run.metric if run.metric in values else "loss"  # some are known for test sets only
    value = values[metric]
    shown = "undefined" if value is None else f"{value:.4f}"
    return text + f"{split} {metric} {shown}, {result['training']['train_seconds']:.1f} s"


class _Watch:
    """Looks into the run directories twice a second, so that the display moves within long runs too."""

    def __init__(self, display: Display, directories: list[RunDirectory], done: int) -> None:
        self.display, self.done = display, done
        self.under_way = {directory.path: directory for directory in directories}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def through(self, path: Path) -> None:
        self.under_way.pop(path, None)
        self.done += 1
        self.display.advance(self.done)

    def _look(self) -> None:
        while not self._stop.wait(0.5):
            self.display.advance(self.done + sum(d.progress() for d in list(self.under_way.values())))

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(
    checkpoints: Sequence[Path], wanted: Sequence[str], memory: str | None = None
) -> Iterator[tuple[RunDirectory, str, dict[str, Any]]]:
    """Measure trained runs, replacing what was stored under the same labels.

    Args:
        checkpoints: run directories, or results folders of studies, which stand for their final runs.
        wanted: measures by name, by label, or as YAML; the study's own measures if empty.
        memory: budget of curvature's graphs and vectors, as ``2GB``; half of what is available if None.

    Yields:
        Run directory, label, and what was stored.
    """
    from flatbench.curvature.memory import limited, parsed
    from flatbench.measuring import take_measures

    budget = None if memory is None else parsed(memory)
    directories = [directory for path in checkpoints for directory in _run_directories(path)]
    # every checkpoint and measure is looked at before the first is measured
    jobs = [(directory, _wanted(directory, wanted)) for directory in directories]
    for directory, chosen in jobs:
        for label, config in chosen.items():
            with limited(budget):
                take_measures(directory, {label: config})
            yield directory, label, directory.measures()[label]


def _run_directories(path: Path) -> list[RunDirectory]:
    if (path / "study.json").is_file():
        folder = StudyFolder(path.parent, path.name)
        return [d for d in folder.directories() if d.spec()["config"]["stage"] == "final" and d.result()]
    directory = RunDirectory(path)
    directory.spec()
    if directory.result() is None:
        raise InputError(f"{path}: this run is not trained yet ({directory.state()}); finish it first")
    return [directory]


def _wanted(directory: RunDirectory, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    own = directory.spec()["measures"]
    if not wanted:
        if not own:
            raise InputError(f"{directory.path}: its study names no measures; name one with --measure")
        return dict(own)
    found: dict[str, dict[str, Any]] = {}
    for text in wanted:
        matching = {k: v for k, v in own.items() if text in (k, v["name"])}
        if matching:
            found |= matching
            continue
        try:
            entry = study_files.parse(text)
        except ValueError as error:
            raise InputError(f"--measure {text}: {error}") from None
        label, config = resolve_measure(entry, "--measure", text)
        found[label] = config
    return found


def describe_measure(directory: RunDirectory, label: str, stored: dict[str, Any]) -> str:
    """One line on what was measured."""
    if "skipped" in stored:
        return f"{directory.id} {label}: skipped: {stored['skipped']}"
    values = [
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in stored["values"].items()
        if not isinstance(value, list | dict)
    ]
    return f"{directory.id} {label}: {', '.join(values)}"
