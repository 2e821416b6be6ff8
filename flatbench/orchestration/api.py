"""Studies run and listed from Python; the command line calls the same functions."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from flatbench.config import study_files
from flatbench.config.names import plain_name
from flatbench.errors import InputError
from flatbench.machine import stopping
from flatbench.machine.terminal import Terminal
from flatbench.orchestration import progress, run_study, stages
from flatbench.orchestration import site as sites
from flatbench.report.analysis.results import Results
from flatbench.runs import trackers
from flatbench.security import remote_code
from flatbench.store import StudyFolder
from flatbench.store.files import write_text
from flatbench.study import load
from flatbench.study.earlier import earlier


class UnfinishedWarning(UserWarning):
    """Some runs of a study failed or diverged; its results hold the others."""


def list_studies() -> dict[str, str]:
    """Name and description of every predefined study."""
    found = {name: study_files.describe(path) for name, path in study_files.predefined().items()}
    return {name: " ".join(description.split()) for name, description in found.items()}


def run(
    study: str | Path | Mapping[str, Any],
    output: str | Path = "results",
    *,
    jobs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    executor: str | None = None,
    site: str | Path | None = None,
    fresh: bool = False,
    roots: Sequence[str | Path] = (),
    trust_remote_code: Sequence[str] = (),
    quiet: bool = False,
) -> Results:
    """Train, tune and measure a study, as ``flatbench run`` does.

    Finished runs are kept, and interrupted ones are gone on with, so that the same call after an interruption
    ends with the same results.

    Args:
        study: a predefined study, a YAML file, or the content of one, which is written to
            ``OUTPUT/NAME.yaml``.
        output: where results go, in a folder with the study's name.
        jobs: runs side by side on this machine; 1 if None.
        overrides: values of the study by their place, as ``{"train.epochs": 1}``.
        executor: where runs run, ``local``, ``slurm`` or ``ray``; the site's, or else local, if None.
        site: YAML file with the executor's options, retries, lease and trackers.
        fresh: forget earlier results of these runs.
        roots: folders that the study may read, beside its own, the working directory and ``overrides``.
        trust_remote_code: models whose own Python code may run, if the study asks for it.
        quiet: print no progress.

    Returns:
        The results: ``.final`` has a row a final run.

    Raises:
        InputError: what is wrong with the study, before anything is trained.

    Warns:
        UnfinishedWarning: runs failed or diverged.
    """
    name = _write_study(study, Path(output)) if isinstance(study, Mapping) else str(study)
    console = Terminal(quiet=quiet)
    given = [f"{place}={json.dumps(value)}" for place, value in (overrides or {}).items()]
    remote_code.grant(trust_remote_code)
    for outcome in outcomes(
        name, given, Path(output), jobs, executor, None if site is None else Path(site), fresh, roots, console
    ):
        console.print(outcome.summary(), markup=False)
        if outcome.failed:
            warnings.warn(outcome.summary(), UnfinishedWarning, stacklevel=2)
            break
    return Results.load(StudyFolder(Path(output), study_files.read(name, given)[0]["name"]))


def outcomes(
    study: str,
    overrides: Sequence[str],
    output: Path,
    jobs: int | None,
    executor: str | None,
    site: Path | None,
    fresh: bool,
    roots: Sequence[str | Path],
    console: Console,
) -> Iterator[run_study.Outcome]:
    """Run a study, and before it those that it comes after; what came of each.

    Args:
        overrides: as ``section.key=value``.
        console: where progress is shown.

    Raises InputError for what is wrong with any of them, before the first begins.
    """
    settings = sites.read(site)
    trackers.choose(settings.trackers, str(site))
    chosen = sites.executor(settings, str(site or "--executor"), executor, jobs)

    def planned(name: str, own: Sequence[str]) -> stages.Planner:
        if chosen.apart:  # this process stays small
            return stages.Apart(chosen, name, own, output, roots)
        loaded = load(name, own, roots=roots)
        return stages.Here(loaded, StudyFolder(output, loaded.name))

    planners = [planned(*one) for one in [*earlier(study, overrides, roots=roots), (study, overrides)]]
    with contextlib.ExitStack() as stack:
        for context in (stopping.heeded(), stopping.working()):
            stack.enter_context(context)
        running = stack.enter_context(chosen)
        display = stack.enter_context(progress.display(console))
        for planner in planners:
            yield run_study.run_planned(planner, sites.drive(settings, running), display, fresh=fresh)


def _write_study(content: Mapping[str, Any], output: Path) -> str:
    """The file in which a study's content stands, so that the command line can go on with it."""
    path = output / f"{plain_name(content.get('name'), 'study: name')}.yaml"
    try:
        text = json.dumps(dict(content), indent=1, allow_nan=False)  # which YAML reads
    except (TypeError, ValueError) as error:
        raise InputError(f"study: only what YAML can hold, but {error}") from None
    write_text(path, text + "\n")
    return str(path)
