"""A study as `flatbench show` tells it: its runs, and how long they take on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flatbench import tasks
from flatbench.cli import counts, large, versions
from flatbench.config.hyper_parameters import hyper_text
from flatbench.errors import InputError
from flatbench.estimate import counters, sketches, wall_time
from flatbench.models import pretrained
from flatbench.store import StudyFolder
from flatbench.store import notes as data_notes
from flatbench.study import Study, plan


def runs(study: Study, folder: StudyFolder, listed: bool = False) -> Group:
    """The study's runs with their states; without ids where data or models would have to be downloaded.

    Args:
        listed: every run in a line of its own, and not only how many there are.
    """
    if _at_hand(study):
        found = plan.Plan(study, folder)
        other = versions.told_of_earlier(study.file.after, study.source, folder.path.parent)
        found.notes += [other] * bool(other)
        return _plan_table(found, listed)
    rows, waiting = plan.sketch(study, folder)
    where = "data or models are not here yet: runs get their ids, which hold the data, when they begin"
    notes = [where, *_shortages(study)]
    return _group(study, rows, waiting, notes, listed)


def _at_hand(study: Study) -> bool:
    """Whether data and models are files; also where an option is unusable, which a plan says best."""
    try:
        return _are_files(study)
    except InputError:
        return True


def _are_files(study: Study) -> bool:
    for condition in study.conditions:
        task: Any = tasks.load(condition.task, condition.model)
        model = getattr(task, "model", None)
        if isinstance(model, pretrained.PretrainedModel) and model.folder is None:
            return False
        if sketches.unset(task):
            return False
        source = task.source()
        if source is not None and source.wanted is not None:
            return False
    return True


def _shortages(study: Study) -> Iterable[str]:
    """Classes that the table of sources knows to be short of shots."""
    for condition in study.conditions:
        try:
            task: Any = tasks.load(condition.task, condition.model)
            found = sketches.shortages(task)
        except InputError:
            continue
        for note in data_notes.notes({"fewer_than_shots": found}):
            yield f"{condition.label}: {note}" if condition.label else note


def _plan_table(found: plan.Plan, listed: bool) -> Group:
    selection = found.selection()
    every = [*found.tuning, *found.final(selection)]
    rows = [
        plan.Row(
            run.id,
            str(run.config["stage"]),
            run.condition,
            run.method,
            run.config["seed"],
            run.hyper,
            found.folder.run(run.id).state(),
        )
        for run in every
    ]
    chosen = {(e["condition"], e["method"]) for e in selection if e["chosen"]}
    waiting = {(e["condition"], e["method"]) for e in selection} - chosen
    begun = [run for run, row in zip(every, rows, strict=True) if row.state != "planned"]
    notes = dict.fromkeys(found.notes) | _data_notes(found, begun)
    return _group(found.study, rows, len(waiting) * len(found.study.file.seeds), notes, listed)


def _group(study: Study, rows: Sequence[plan.Row], waiting: int, notes: Iterable[str], listed: bool) -> Group:
    if listed:
        table = Table("run", "stage", "condition", "method", "seed", "hyper-parameters", "state", box=None)
        for row in rows:
            cells = (
                row.id or "-",
                row.stage,
                row.condition,
                row.method,
                str(row.seed),
                hyper_text(row.hyper),
            )
            table.add_row(*map(escape, cells), row.state)
    else:
        table = counts.table((row.stage, row.condition, row.method, row.state) for row in rows)
    about = large.told(study.name, study.file.description, table, waiting)
    return Group(about, *(f"note: {escape(note)}" for note in notes))


def _data_notes(found: plan.Plan, every: Iterable[Any]) -> dict[str, None]:
    """What finished runs recorded of their data, each once."""
    notes: dict[str, None] = {}
    seen = set()
    for run in every:
        kind = run.condition, run.method
        directory = found.folder.run(run.id)
        result = None if kind in seen or directory.damage() else directory.result()
        if result is not None:
            seen.add(kind)  # the runs of a method in a condition see the same data and are trained alike
            where = f"{run.condition}: " if run.condition else ""
            notes |= dict.fromkeys(where + note for note in data_notes.of_result(result))
    return notes


def time_taken(study: Study, folder: StudyFolder) -> Group:
    """Numbers of runs and their wall time on this machine, one after the other, with its error."""
    tuning = final = 0
    for condition in study.conditions:
        for method in condition.methods:
            more = counters.runs(study, condition, method)
            tuning, final = tuning + more[0], final + more[1]
    lines = [f"{tuning + final:,} runs: {tuning:,} tuning, {final:,} final"]
    found = wall_time.wall_time(study, folder)
    if found.times:
        least = "at least " if found.unknown else ""
        basis = ", ".join(dict.fromkeys(f"from {one.basis}" for one in found.times))
        lines.append(
            f"{least}{large.duration(found.total)} on this machine, one after the other, measures included "
            f"({basis}; within a factor of {found.error})"
        )
    lines += [f"time not known: {line}" for line in found.unknown]
    return Group(*map(escape, lines))
