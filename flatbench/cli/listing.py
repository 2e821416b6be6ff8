"""Tables for `flatbench list`, `show` and `doctor`."""

from __future__ import annotations

import importlib.metadata
import re
from importlib.metadata import metadata, requires
from typing import Any

from packaging.requirements import Requirement
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from flatbench import executors, measures, optim, tasks
from flatbench.config import study_files
from flatbench.config.registry import Registry
from flatbench.errors import shown
from flatbench.executors.local import cores
from flatbench.machine import environment
from flatbench.study.methods import METHOD_DESCRIPTIONS

DISTRIBUTION = "flatbench-lora"


def everything() -> Group:
    """Tables of studies, tasks, methods, measures and executors."""
    studies = {name: _first(study_files.describe(path)) for name, path in study_files.predefined().items()}
    aliases = {alias: f"Another name of {name}." for alias, name in optim.ALIASES.items()}
    methods = {**METHOD_DESCRIPTIONS, **_descriptions(optim.REGISTRY), **aliases}
    return Group(
        _names("Studies", studies),
        _names("Tasks", _descriptions(tasks.REGISTRY)),
        _names("Methods and optimizers", methods),
        _names("Measures", _descriptions(measures.REGISTRY)),
        _names("Executors", _descriptions(executors.REGISTRY)),
        "[dim]Each study's whole description and runs: flatbench show STUDY; methods and measures in words: "
        "docs/glossary.md[/dim]",
    )


def _first(description: str) -> str:
    """The first sentence of a description; what it needs, and what it is not, `flatbench show` tells.

    >>> _first("Five methods on digits (scikit-learn): a small ViT. Offline, minutes on two cores.")
    'Five methods on digits (scikit-learn): a small ViT.'
    """
    return re.split(r"(?<=[.?!])\s+(?=[A-Z])", " ".join(description.split()), maxsplit=1)[0]


def _descriptions(registry: Registry) -> dict[str, str]:
    return {name: registry.describe(name) for name in registry.names()}


def _names(title: str, entries: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, description in entries.items():
        table.add_row(escape(name), escape(shown(" ".join(description.split()), 1000)))
    return table


def cost(found: Any, needed: Any) -> Group:
    """An `Estimate` and `Needs` of `flatbench.estimate`, and what was assumed."""
    tables: dict[str, Table] = {}
    for one in found.costs:
        if one.condition not in tables:
            table = Table("method", title=escape(one.condition) or None, title_justify="left", box=None)
            names = ("tuning runs", "final runs", "gradients a step", "GFLOP an example", "GPU hours")
            for name in (*names, "measuring %", "memory GB"):
                table.add_column(name, justify="right")
            tables[one.condition] = table
        share = None if one.measuring is None else 100 * one.measuring
        memory = None if one.memory is None else one.memory / 1e9
        numbers = (one.gradients_per_step, one.gflops_per_example, one.hours, share, memory)
        shown = ["unknown" if number is None else f"{number:,.3g}" for number in numbers]
        runs = (f"{one.tuning_runs:,}", f"{one.final_runs:,}")
        tables[one.condition].add_row(escape(one.method), *runs, *shown)
    rates = f"bf16 {found.gpu.bf16:g}, fp32 {found.gpu.fp32:g} TFLOP/s"
    lines = [
        _total(found),
        f"assumed: {found.utilisation:.0%} of the peak of {found.gpu.name} ({rates}), and 0.1 ms "
        "until a layer is asked for",
        "error: a factor of three either way; docs/efficiency.md holds it against published run times",
        *(f"not known: {line}" for line in found.unknown),
    ]
    if found.assumed:
        which = f"{len(found.assumed)} conditions" if len(found.assumed) > 1 else "examples"
        lines.append(
            f"numbers and lengths of {which} are those of the table of sources: nothing was downloaded"
        )
    if found.excluded:
        lines.append(f"not counted: {', '.join(found.excluded)}")
    lines += need_lines(needed)
    return Group(
        f"{found.study}: estimated cost, finished runs included", *tables.values(), *map(escape, lines)
    )


def need_lines(needed: Any) -> list[str]:
    """What a study downloads and writes down."""
    lines = []
    if needed.downloads:
        each = [
            f"{name} {'of unknown size' if size is None else size_text(size * 1e6)}"
            for name, size in needed.downloads.items()
        ]
        total = size_text(1e6 * sum(size or 0 for size in needed.downloads.values()))
        lines.append(f"download: about {total}: {', '.join(each)}")
    if needed.results is not None:
        lines.append(f"results: about {size_text(needed.results)} on disk")
    return lines


def size_text(count: float) -> str:
    """Bytes in the unit that suits them.

    >>> size_text(1.4e9)
    '1.4 GB'
    """
    unit = "GB" if count >= 1e9 else "MB"
    return f"{count / (1e9 if unit == 'GB' else 1e6):,.3g} {unit}"


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
    return Group(table, *map(escape, outside_bounds()), *_extras())


def outside_bounds() -> list[str]:
    """One line a package that is installed in a version with which flatbench is not tested."""
    lines = []
    for need in map(Requirement, requires(DISTRIBUTION) or ()):
        found = _installation(need.name)
        if found is not None and not need.specifier.contains(found, prereleases=True):
            line = f"outside the bounds: {need.name} {found}, but flatbench needs {need.name}{need.specifier}"
            lines.append(f"{line}: pip install '{need.name}{need.specifier}'")
    return list(dict.fromkeys(lines))


def _extras() -> list[str]:
    """One line an extra: complete, or what is missing."""
    lines = []
    needs = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    for extra in metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        missing = [
            need.name
            for need in needs
            if need.marker and need.marker.evaluate({"extra": extra}) and _installation(need.name) is None
        ]
        lines.append(f"extra \\[{extra}]: " + (f"missing {', '.join(missing)}" if missing else "complete"))
    return lines


def _installation(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
