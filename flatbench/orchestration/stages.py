"""Plan a study's next stage: prepare its runs' directories, and select those to be finished."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flatbench.config import study_files
from flatbench.config.hyper_parameters import hyper_text
from flatbench.config.names import plain_name
from flatbench.errors import InputError
from flatbench.executors.base import Executor
from flatbench.store import StudyFolder, claims
from flatbench.store.content import tied
from flatbench.study import Study, load
from flatbench.study.plan import Plan
from flatbench.study.run import Run


@dataclass(frozen=True)
class Stage:
    """One of a study's two stages.

    Attributes:
        states: the state of every run of the stage by its id.
        pending: the ids of those that are to be finished.
        lines: what the user should know before it begins.
        undecided: methods without final runs, because all their tuning runs failed.
        last: whether no stage comes after it.
        notes: what is known of the data already, by condition.
        study: the study's sections as study.json has them, by which another version is told from this one.
    """

    name: str
    states: dict[str, str]
    pending: list[str]
    last: bool
    lines: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    study: dict[str, Any] = field(default_factory=dict)


class Planner(Protocol):
    """Interface of what plans a study, stage by stage.

    There are two, because planning loads the tasks, and torch and the data with them. Where this process does
    the work itself it has those anyway: `Here`. Where others do, this one waits for days, perhaps on a login
    node, and has no use for them: `Apart`. How a planned study is driven is the same for both.
    """

    @property
    def folder(self) -> StudyFolder:
        """Where its results go."""

    def warm(self, executor: Executor) -> None:
        """Have the executor begin what takes time, while the study is planned."""

    def stage(self, last: bool, fresh: bool = False) -> Stage:
        """The first stage, or the last one; run directories and study.json are written.

        Args:
            fresh: forget what these runs have found.

        Raises InputError for what is wrong with the study's input.
        """


class Here:
    """Plans in this process, which loads the tasks for that, and torch with them."""

    def __init__(self, study: Study, folder: StudyFolder) -> None:
        self.study, self.folder = study, folder

    def warm(self, executor: Executor) -> None:
        """Have the executor start its workers, while the study is planned."""
        executor.warm()

    def stage(self, last: bool, fresh: bool = False) -> Stage:
        """Write the stage's run directories and study.json. Raises InputError for wrong input."""
        plan = Plan(self.study, self.folder)
        self.folder.prepare()
        if fresh and not last:
            _forget(plan)
        if plan.tuning and not last:
            return _prepare_stage(f"{self.study.name}: tuning", plan, plan.tuning, False, [], [])
        selection = plan.selection()
        lines, undecided = [], []
        for entry in selection:
            if entry["chosen"]:
                where = _method_label(entry["condition"], entry["method"])
                choice = hyper_text(entry["choice"])
                count = tied(entry, selection)
                first = f", the first of {count} that tied" if count > 1 else ""
                lines.append(f"{where}: chosen on validation ({entry['score']:.4f}{first}): {choice}")
        if plan.tuning:
            decided = {(e["condition"], e["method"]) for e in selection if e["chosen"]}
            every = dict.fromkeys((e["condition"], e["method"]) for e in selection)
            undecided = [_method_label(*which) for which in every if which not in decided]
        return _prepare_stage(
            f"{self.study.name}: final", plan, plan.final(selection), True, lines, undecided
        )


class Apart:
    """Plans in another process, so that this one stays small.

    Args:
        executor: whose process it is.
        study: a predefined study or the path of a study file.
        overrides: as `flatbench.study.load` takes them.
        results: the folder that holds studies' results.
        roots: as `flatbench.study.load` takes them.
    """

    def __init__(
        self,
        executor: Executor,
        study: str,
        overrides: Sequence[str],
        results: Path,
        roots: Sequence[str | Path] = (),
    ) -> None:
        content, source = study_files.read(study, overrides)
        self.executor, self.study, self.overrides = executor, study, list(overrides)
        self.results, self.roots = results, list(roots)
        self.folder = StudyFolder(results, plain_name(content.get("name"), f"{source}: name"))

    def warm(self, executor: Executor) -> None:
        """Have all workers read the study, which imports its tasks."""
        executor.warm(functools.partial(load, self.study, self.overrides, roots=self.roots))

    def stage(self, last: bool, fresh: bool = False) -> Stage:
        """Have a worker write the stage's run directories and study.json; see `Here.stage`."""
        asked = (self.study, self.overrides, self.results, self.roots, last, fresh)
        return self.executor.call(_stage, *asked)


def _stage(
    study: str, overrides: Sequence[str], results: Path, roots: Sequence[str | Path], last: bool, fresh: bool
) -> Stage:
    loaded = load(study, overrides, roots=roots)
    return Here(loaded, StudyFolder(results, loaded.name)).stage(last, fresh)


def _method_label(condition: str, method: str) -> str:
    return f"{method} ({condition})" if condition else method


def _forget(plan: Plan) -> None:
    """Clear the tuning runs first, while the final runs that they led to are still known."""
    for run in [*plan.final(plan.selection()), *plan.tuning]:
        plan.folder.run(run.id).clear()


def _prepare_stage(
    name: str, plan: Plan, runs: Sequence[Run], last: bool, lines: list[str], undecided: list[str]
) -> Stage:
    states, pending, lines = {}, [], [*lines]
    for run in {run.id: run for run in runs}.values():  # equal configurations are one run
        directory, spec = plan.folder.run(run.id), run.spec()
        directory.prepare(spec)
        state = directory.state()
        if state == "damaged":
            lines.append(f"{run.id}: damaged ({directory.damage_text()}); it is made anew")
        if state == "failed":
            # tried again; what failed is told by its events, and a failure from now on is a new one
            directory.forget("failure")
        states[run.id] = state
        if state in ("done", "diverged"):
            claims.sweep(directory.path)
        if state != "diverged" and not directory.complete(spec):
            pending.append(run.id)
    snapshot = plan.snapshot()
    with contextlib.suppress(InputError):  # a damaged list is written anew
        lines += _removal_notes(plan.folder, {place["id"] for place in snapshot["runs"]})
    plan.folder.write(snapshot)
    return Stage(name, states, pending, last, lines, undecided, list(plan.notes), snapshot["study"])


def _removal_notes(folder: StudyFolder, now: set[str]) -> list[str]:
    """Say so when the folder held another version of the study, whose runs a report no longer shows."""
    if not folder.file.is_file():
        return []
    others = [run for run in folder.directories() if run.id not in now]
    before = {run.id for run in others if run.state() == "done"}
    working = [run.id for run in others if claims.holder(run.path) is not None]
    lines = []
    if working:
        lines.append(
            f"{folder.path}: another version of this study is being run here ({len(working)} of its runs "
            "under way); both go on, and reports show the version that is run last; use another --output to "
            "have both"
        )
    if not before:
        return lines
    return [
        *lines,
        f"{folder.path} held another version of this study; {len(before)} finished runs are kept there, but "
        "are not a part of this version; use another --output to have both",
    ]
