"""Tables for `flatbench list`, `show` and `doctor`."""

from __future__ import annotations

import importlib.metadata
from importlib.metadata import metadata, requires
from typing import Any

from packaging.requirements import Requirement
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flatbench import executors, measures, optim, tasks
from flatbench.config import study_files
from flatbench.config.hyper_parameters import hyper_text
from flatbench.config.registry import Registry
from flatbench.executors.local import cores
from flatbench.machine import environment
from flatbench.store import notes as data_notes
from flatbench.study.methods import METHOD_DESCRIPTIONS

DISTRIBUTION = "flatbench-lora"


def everything() -> Group:
    """Tables of studies, tasks, methods, measures and executors."""
    studies = {name: study_files.describe(path) for name, path in study_files.predefined().items()}
    aliases = {alias: f"Another name of {name}." for alias, name in optim.ALIASES.items()}
    methods = {**METHOD_DESCRIPTIONS, **_descriptions(optim.REGISTRY), **aliases}
    return Group(
        _names("Studies", studies),
        _names("Tasks", _descriptions(tasks.REGISTRY)),
        _names("Methods and optimizers", methods),
        _names("Measures", _descriptions(measures.REGISTRY)),
        _names("Executors", _descriptions(executors.REGISTRY)),
    )


def _descriptions(registry: Registry) -> dict[str, str]:
    return {name: registry.describe(name) for name in registry.names()}


def _names(title: str, entries: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, description in entries.items():
        table.add_row(escape(name), escape(" ".join(description.split())))
    return table


def runs(plan: Any) -> Group:
    """The runs of a `flatbench.study.plan.Plan` with their states."""
    table = Table("run", "stage", "condition", "method", "seed", "hyper-parameters", "state", box=None)
    selection = plan.selection()
    every = [*plan.tuning, *plan.final(selection)]
    for run in every:
        row = (
            run.id,
            run.config["stage"],
            run.condition,
            run.method,
            str(run.config["seed"]),
            hyper_text(run.hyper),
        )
        table.add_row(*map(escape, row), plan.folder.run(run.id).state())
    study = plan.study
    waiting = {(e["condition"], e["method"]) for e in selection} - {
        (e["condition"], e["method"]) for e in selection if e["chosen"]
    }
    lines: list[Any] = [f"{study.name}: {escape(study.file.description)}".rstrip(": "), table]
    if waiting:
        count = len(waiting) * len(study.file.seeds)
        lines.append(f"and {count} final runs, once hyper-parameters are chosen on validation data")
    notes = dict.fromkeys(plan.notes) | _data_notes(plan, every)
    return Group(*lines, *(f"note: {escape(note)}" for note in notes))


def _data_notes(plan: Any, every: Any) -> dict[str, None]:
    """What finished runs recorded of their data, each once."""
    found: dict[str, None] = {}
    seen = set()
    for run in every:
        kind = run.condition, run.method
        result = None if kind in seen else plan.folder.run(run.id).result()
        if result is not None:
            seen.add(kind)  # the runs of a method in a condition see the same data and are trained alike
            where = f"{run.condition}: " if run.condition else ""
            found |= dict.fromkeys(where + note for note in data_notes.of_result(result))
    return found


def cost(found: Any) -> Group:
    """An `Estimate` of `flatbench.estimate`: hours of every method, what was assumed, what is not counted."""
    tables: dict[str, Table] = {}
    for one in found.costs:
        if one.condition not in tables:
            table = Table("method", title=escape(one.condition) or None, title_justify="left", box=None)
            for name in ("tuning runs", "final runs", "gradients a step", "GFLOP an example", "GPU hours"):
                table.add_column(name, justify="right")
            tables[one.condition] = table
        numbers = (one.gradients_per_step, one.gflops_per_example, one.hours)
        shown = ["unknown" if number is None else f"{number:,.3g}" for number in numbers]
        runs = (f"{one.tuning_runs:,}", f"{one.final_runs:,}")
        tables[one.condition].add_row(escape(one.method), *runs, *shown)
    rates = f"bf16 {found.gpu.bf16:g}, fp32 {found.gpu.fp32:g} TFLOP/s"
    lines = [
        _total(found),
        f"assumed: {found.utilisation:.0%} of the peak of {found.gpu.name} ({rates})",
        *(f"not known: {line}" for line in found.unknown),
    ]
    if found.excluded:
        lines.append(f"not counted: {', '.join(found.excluded)}")
    return Group(
        f"{found.study}: estimated cost, finished runs included", *tables.values(), *map(escape, lines)
    )


def _total(found: Any) -> str:
    if all(one.hours is None for one in found.costs):
        return "in all: unknown"
    least = "at least " if found.unknown else ""
    return f"in all: {least}{found.hours:,.3g} GPU hours, {found.operations:.3g} operations"


def machine() -> Group:
    """Versions, devices, threads, and packages that extras would add."""
    import torch

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, version in environment.versions().items():
        table.add_row(escape(name), version)
    table.add_row("processor", escape(environment.processor()))
    table.add_row("cores", str(cores()))
    table.add_row("threads", str(torch.get_num_threads()))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("GPUs", escape(", ".join(devices)) or "none")
    return Group(table, *_extras())


def _extras() -> list[str]:
    """One line an extra: complete, or what is missing."""
    lines = []
    needs = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        missing = [
            need.name
            for need in needs
            if need.marker and need.marker.evaluate({"extra": extra}) and not _is_installed(need.name)
        ]
        lines.append(f"extra \\[{extra}]: " + (f"missing {', '.join(missing)}" if missing else "complete"))
    return lines


def _is_installed(distribution: str) -> bool:
    try:
        metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
