"""Small studies for tests of executors: they are made ready, started, held, and compared with each other."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml
from rich.console import Console

from flatbench import store, study
from flatbench.executors.local import Local
from flatbench.models import weights as model_weights
from flatbench.orchestration import progress, run_study
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory, StudyFolder, events
from flatbench.study import plan
from tests import warm
from tests.conftest import SMALL
from tests.holds import Hold

#: three tuning runs and three final ones, of three epochs each: one can be killed after two of them
STUDY: dict[str, Any] = {
    **SMALL,
    "methods": ["lora", "eflat_lora", {"name": "sam", "grid": {"rho": [0.05]}}],
    "tune": {"grid": {"lr": [1e-2]}, "seeds": [9]},
    "seeds": [0],
    "measures": [{"name": "sam_sharpness", "examples": 20, "steps": 2}],
}
#: two final runs
PAIR: dict[str, Any] = {**SMALL, "methods": ["lora", "sam"], "seeds": [0], "measures": []}


class Outcome(NamedTuple):
    """What a study has found: its table without clocks, and a digest of each run's weights."""

    table: pd.DataFrame
    digests: dict[str, str]


def outcome(folder: Path) -> Outcome:
    """What is in the results below a working directory."""
    found = StudyFolder(folder / "results", "small")
    table = store.table(found)
    clocks = [c for c in table.columns if c.endswith("seconds")]
    return Outcome(table.drop(columns=clocks), weights(found.directories()))


def assert_same(folder: Path, expected: Outcome) -> None:
    found = outcome(folder)
    assert found.digests == expected.digests
    pd.testing.assert_frame_equal(found.table, expected.table)


def undisturbed(folder: Path, content: Mapping[str, Any]) -> Outcome:
    """What a study finds that nobody disturbs, run in this very process."""
    loaded = study.Study(_copy(content), "small.yaml")
    with Local(jobs=1) as executor, progress.display(Console(file=io.StringIO())) as display:
        done = run_study.run(loaded, StudyFolder(folder / "results", "small"), executor, display)
    assert not done.failed, done.summary()
    return outcome(folder)


def written(folder: Path, content: Mapping[str, Any], site: Mapping[str, Any] | None = None) -> Path:
    """A working directory with ``small.yaml``, and ``site.yaml``."""
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(dict(content), sort_keys=False))
    if site is not None:
        (folder / "site.yaml").write_text(yaml.safe_dump(dict(site)))
    return folder


def start(folder: Path, *options: str, hold: Hold | None = None, **variables: str) -> warm.Command:
    """`flatbench run` on the study of a working directory; what it says is added to ``output.txt`` there."""
    held = hold.environment() if hold is not None else {}
    command = ("run", "small.yaml", *options)
    return warm.run(*command, cwd=folder, output=folder / "output.txt", **{**held, **variables})


def prepared(root: Path, epochs: int = SMALL["train"]["epochs"], **more: Any) -> list[RunDirectory]:
    """Run directories made ready: of two methods and two seeds, unless it is said otherwise."""
    content = {**SMALL, "methods": ["lora", "sam"], "seeds": [0, 1], **more}
    content["train"] = {**SMALL["train"], "epochs": epochs}
    loaded = study.Study(_copy(content), "small.yaml")
    folder = StudyFolder(root, "small")
    directories = []
    for run in plan.Plan(loaded, folder).final([]):
        directories.append(folder.run(run.id))
        directories[-1].prepare(run.spec())
    return directories


def finished_weights(directories: Sequence[RunDirectory]) -> dict[str, str]:
    """Finish runs in this process; a digest of each one's weights."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert {finish(directory.path) for directory in directories} == {"done"}
    return weights(directories)


def weights(directories: Sequence[RunDirectory]) -> dict[str, str]:
    return {d.id: model_weights.saved_digest(d.adapter) for d in directories}


def runs(folder: Path) -> list[RunDirectory]:
    """The run directories that there are below a working directory."""
    return [RunDirectory(path) for path in sorted((folder / "results" / "small" / "runs").glob("*"))]


def happened(*directories: RunDirectory) -> list[str]:
    """Names of the events of these runs."""
    return [event["event"] for directory in directories for event in events.read(directory.path)]


def assert_no_step_twice(*directories: RunDirectory) -> None:
    """Of runs that were killed or stopped after an epoch, or not at all: what was saved was gone on with."""
    for directory in directories:
        made = [e for e in events.read(directory.path) if e["event"] == "epoch"]
        epochs = directory.spec()["config"]["train"]["epochs"]
        assert [e["epoch"] for e in made] == list(range(1, epochs + 1))
        assert sum(e["steps"] for e in made) == made[-1]["step"]


def left_over(directories: Sequence[RunDirectory]) -> list[str]:
    """Files that only belong to a run under way, or were never finished."""
    names = [path.name for directory in directories for path in directory.path.rglob("*")]
    return [name for name in names if name.startswith((".", "claim", "state"))]


def _copy(content: Mapping[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(content)))
    return copy
