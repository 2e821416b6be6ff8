"""Measuring runs again or anew, by their directories or by their study."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flatbench.config.yaml import parse
from flatbench.errors import InputError
from flatbench.report.resolution import unresolved
from flatbench.report.text.glossary import ANSWERS
from flatbench.store import RunDirectory, StudyFolder
from flatbench.study import resolve_measure


def measure(
    checkpoints: Sequence[Path],
    wanted: Sequence[str],
    memory: str | None = None,
    scratch: Path | None = None,
) -> Iterator[tuple[RunDirectory, str, dict[str, Any]]]:
    """Measure trained runs, replacing what was stored under the same labels.

    Args:
        checkpoints: run directories, or results folders of studies, which stand for their final runs.
        wanted: measures by name, by label, or as YAML; the study's own measures if empty.
        memory: budget of curvature's graphs and vectors, as ``2GB``; half of what is available if None.
        scratch: folder for the vectors of eigenvalue searches that the memory does not hold.

    Yields:
        Run directory, label, and what was stored.
    """
    from flatbench.curvature.operators.memory import limited, parsed
    from flatbench.runs.measure import take_measures

    budget = None if memory is None else parsed(memory)
    directories = [directory for path in checkpoints for directory in _run_directories(path)]
    # every checkpoint and measure is looked at before the first is measured
    jobs = [(directory, _measures_to_take(directory, wanted)) for directory in directories]
    for directory, chosen in jobs:
        for label, config in chosen.items():
            with limited(budget, scratch):
                take_measures(directory, {label: config})
            yield directory, label, directory.measures()[label]


def _run_directories(path: Path) -> list[RunDirectory]:
    folder = StudyFolder(path.parent, path.name)
    if folder.exists():
        return [d for d in folder.directories() if d.spec()["config"]["stage"] == "final" and d.result()]
    directory = RunDirectory(path)
    saved = any(path.glob("adapter_config.json")) or any(path.glob("config.json"))
    if not (path / "run.json").exists() and (saved or any(path.glob("checkpoint-*"))):
        raise InputError(
            f"{path}: not a run directory; to measure a saved checkpoint, give --data FILE as well"
        )
    directory.spec()
    directory.trained_result()
    return [directory]


def _measures_to_take(directory: RunDirectory, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
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
            entry = parse(text)
        except ValueError as error:
            raise InputError(f"--measure {text}: {error}") from None
        label, config = resolve_measure(entry, "--measure", text)
        found[label] = config
    return found


_UNITS = {"seconds": " s", "ms": " ms", "mb": " MB", "joules": " J", "gflops": " GFLOP"}


def describe_measure(directory: RunDirectory, label: str, stored: dict[str, Any]) -> str:
    """What was measured: the number that it is about on the first line, everything else below."""
    if "skipped" in stored:
        return f"{directory.id} {label}: skipped: {stored['skipped']}"
    hidden = unresolved(stored["values"])
    shown = {
        name: f"{name} {value:.6g}{_unit(name)}"
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in hidden
        else f"{name} {value}"
        for name, value in {**stored["values"], **hidden}.items()
        if value is not None and not isinstance(value, list | dict)
    }
    first = shown.pop(next((name for name in (*ANSWERS, "step_ms") if name in shown), ""), None)
    start = f"{directory.id} {label}: "
    if first is None:
        return start + ", ".join(shown.values())
    return f"{start}{first}" + (f"\n    {', '.join(shown.values())}" if shown else "")


def _unit(name: str) -> str:
    """The unit that a value's name ends in, or begins with, after a space."""
    words = name.split("_")
    return next((unit for key, unit in _UNITS.items() if key in words and "ratio" not in words), "")
