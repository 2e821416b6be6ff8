"""A study whose study.json is gone is read from its run directories: the same runs, the same numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from flatbench import cli, load_results, report, store
from flatbench.cli import commands
from flatbench.errors import InputError
from flatbench.executors.local import Local
from flatbench.orchestration import progress, run_study
from flatbench.store import StudyFolder
from flatbench.study import Study
from tests.conftest import SMALL
from tests.report.synthetic import make, plain


def sorted_rows(frame: pd.DataFrame) -> pd.DataFrame:
    columns = sorted(frame.columns)
    return frame[columns].sort_values(["stage", "run"]).reset_index(drop=True)


def by_trial(selection: list[dict[str, Any]]) -> dict[str, Any]:
    return {json.dumps([e["condition"], e["method"], e["choice"]]): e for e in selection}


def some_fail(method: str, condition: str, seed: int, choice: dict[str, Any]) -> Any:
    if method == "sam" and choice["lr"] == 0.1:
        return {"state": "diverged", "error": "nan"}
    return plain(method, condition, seed, choice)


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize("conditions", [("",), ("a", "b")])
def test_what_the_directories_tell_is_what_the_index_said(
    tmp_path: Path, tuned: bool, conditions: tuple[str, ...]
) -> None:
    folder = make(tmp_path, some_fail, tuned=tuned, conditions=conditions)  # type: ignore[arg-type]
    known, table = folder.read(), store.table(folder)
    folder.file.unlink()
    found = folder.read()
    assert found["rebuilt"]
    assert not folder.file.exists()
    pd.testing.assert_frame_equal(sorted_rows(store.table(folder)), sorted_rows(table))
    assert by_trial(found["selection"]) == by_trial(known["selection"])
    for key in ("methods", "conditions", "seeds"):
        assert found[key] == known[key]
    assert {m: b["trials"] for m, b in found["budget"].items()} == dict.fromkeys(known["methods"], 3)
    assert found["budget"]["lora"]["grid"] == known["budget"]["lora"]["grid"]


@pytest.mark.slow
def test_a_report_says_that_the_index_was_missing(tmp_path: Path) -> None:
    folder = make(tmp_path)
    before = report.write_report(report.open_results("demo", tmp_path), tmp_path / "before")
    folder.file.unlink()
    for where in ("demo", str(folder.path)):
        loaded = report.open_results(where, tmp_path)
        made = report.write_report(loaded, tmp_path / "after", html=True)
        assert "study.json was missing" in made.notes[0]
        assert len(made.files) == len(before.files) + 1
    assert len(load_results(folder.path)) == 12


@pytest.mark.slow
def test_a_study_that_ran_is_shown_and_run_again_without_its_index(tmp_path: Path) -> None:
    content = {**SMALL, "methods": ["lora", "sam"], "tune": {"grid": {"lr": [1e-2, 1e-3]}, "seeds": [9]}}
    content["tune"]["metric"] = "loss"  # type: ignore[index]
    study, folder = Study(content, "small.yaml"), StudyFolder(tmp_path, "small")
    with progress.display(commands.Terminal(quiet=True)) as display:
        run_study.run(study, folder, Local(), display)
    known = folder.read()
    folder.file.unlink()
    assert by_trial(folder.read()["selection"]) == by_trial(known["selection"])
    shown = CliRunner().invoke(cli.app, ["status", "small", "--results", str(tmp_path)])
    assert "6 runs: 6 done" in shown.output
    with progress.display(commands.Terminal(quiet=True)) as display:
        run_study.run(study, folder, Local(), display)
    assert folder.read() == known


def test_a_damaged_run_directory_is_named(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.file.unlink()
    run = sorted((folder.path / "runs").iterdir())[0] / "run.json"
    content = json.loads(run.read_text())
    del content["method"]
    run.write_text(json.dumps(content))
    found = folder.read()
    assert run.parent.name not in {place["id"] for place in found["runs"]}
    (lost,) = found["lost"]
    assert str(run) in lost
    assert "'method'" in lost


def test_nothing_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no results of a study here"):
        StudyFolder(tmp_path, "small").read()
    with pytest.raises(InputError, match="neither study"):
        load_results(tmp_path)


def test_trained_final_runs_come_first_and_the_best_is_by_validation(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = plain(method, condition, seed, choice)
        if (method, seed) == ("lora", 0):
            return {"state": "failed", "error": "lost"}
        # the test metric would choose another seed
        return {**found, "validation": found["validation"] + 0.01 * (seed % 10), "test": 0.9 - 0.1 * seed}

    runs = load_results(make(tmp_path, outcomes).path)
    assert runs["stage"].tolist() == ["final"] * 6 + ["tune"] * 6
    assert runs["state"].tolist()[:6] == ["done"] * 5 + ["failed"]
    assert (runs["stage"][0], runs["state"][0]) == ("final", "done")  # what `runs["path"][0]` opens
    assert len(runs.final) == 5
    best = runs.best()
    assert (best["method"], best["seed"], best["stage"]) == ("lora", 2, "final")
    assert Path(best["path"]).is_dir()
    assert runs.best("sam")["method"] == "sam"
    assert len(runs[runs["method"] == "sam"].final) == 3  # a selection knows it too
    with pytest.raises(InputError, match=r"no final run of nothing .*methods with final runs: lora, sam"):
        runs.best("nothing")
