"""Results that an older flatbench wrote are read, reported and gone on with.

`data/older_results` was written before the modules moved into their rooms: three runs are finished, the
fourth was interrupted after two of its three epochs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatbench import cli, store
from flatbench.models import weights
from flatbench.runs import open as opening
from flatbench.store import RunDirectory, StudyFolder, events, training_state

OLDER = Path(__file__).parent / "data" / "older_results"
CUT = "52af8f4359b945aa"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    return tmp_path / "older"


def begin_here(directory: RunDirectory) -> None:
    """Let a saved training have begun on this processor.

    digits trains its base first, whose last bits are of the processor; a training that began with another
    base begins anew.
    """
    start = weights.digest(opening.open_run(directory, trained=False).model)
    for path in (directory.state_file, directory.previous_state_file):
        training_state.save(path, {**training_state.load(path), "start": start})


def test_they_are_read(folder: Path) -> None:
    table = store.table(StudyFolder(folder, "small")).set_index("run")
    assert dict(table["state"].value_counts()) == {"done": 3, "interrupted": 1}
    done = table[table["state"] == "done"]
    for column in ("test.accuracy", "hessian_merged.eigenvalue_1", "sam_sharpness_merged.sharpness"):
        assert done[column].notna().all()
    assert done["hyper.lr"].tolist() == [0.01] * 3


@pytest.mark.slow
def test_they_are_reported_and_gone_on_with(folder: Path) -> None:
    def happened(run: str) -> list[str]:
        return [event["event"] for event in events.read(study.path / "runs" / run)]

    study = StudyFolder(folder, "small")
    begin_here(next(directory for directory in study.directories() if directory.id == CUT))
    before = {directory.id: happened(directory.id) for directory in study.directories()}
    reported = CliRunner().invoke(cli.app, ["report", "small.yaml", "--results", ".", "--output", "report"])
    assert reported.exit_code == 0, reported.output
    assert "1 of 2 final runs are not finished" in (folder / "report/small/README.md").read_text()

    gone_on = CliRunner().invoke(cli.app, ["run", "small.yaml", "--output", "."])
    assert gone_on.exit_code == 0, gone_on.output
    assert {directory.id: directory.state() for directory in study.directories()} == dict.fromkeys(
        before, "done"
    )
    for run in before:
        if run != CUT:  # measures whose defaults have changed since are taken anew, and nothing else
            assert happened(run)[: len(before[run])] == before[run]
            assert set(happened(run)[len(before[run]) :]) <= {"measured", "done"}
    new = happened(CUT)[len(before[CUT]) :]
    assert new[0] == "resumed"
    assert new.count("epoch") == 1
    assert new.count("trained") == 1
