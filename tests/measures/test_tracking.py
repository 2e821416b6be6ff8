"""Measures during training and on interruption, through the runner and the command line's function."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flatbench import store, study
from flatbench.errors import InputError
from flatbench.measures.hessian import Hessian
from flatbench.runs.finish import finish
from flatbench.runs.remeasure import measure
from flatbench.study import plan
from tests.conftest import SMALL

EVERY_EPOCH = [{"name": "hessian", "k": 2, "every": 1, "examples": 40, "max_iterations": 200}]


class Killed(BaseException):
    """Stands for SIGKILL."""


def prepared(folder: Path, measures: list[Any]) -> store.RunDirectory:
    content = {**SMALL, "methods": ["eflat_lora"], "measures": measures}
    made = store.StudyFolder(folder, "small")
    (run, *_) = plan.Plan(study.Study(content, "small.yaml"), made).final([])
    directory = made.run(run.id)
    directory.prepare(run.spec())
    return directory


def tracked(directory: store.RunDirectory) -> pd.DataFrame:
    history = pd.read_parquet(directory.path / "history.parquet")
    rows = history.dropna(subset=["hessian_merged.eigenvalue_1"])
    return rows[[c for c in rows.columns if c == "epoch" or "hessian" in c]].drop(
        columns="hessian_merged.seconds"
    )


@pytest.mark.slow
def test_eigenvalues_are_tracked_without_a_trace_in_the_training(tmp_path: Path) -> None:
    with_, without = prepared(tmp_path / "a", EVERY_EPOCH), prepared(tmp_path / "b", [])
    assert finish(with_.path) == finish(without.path) == "done"
    rows = tracked(with_)
    assert rows["epoch"].tolist() == [1, 2, 3]
    assert rows["hessian_merged.converged"].all()
    assert (with_.result() or {})["weights"] == (without.result() or {})["weights"]
    final = with_.measures()["hessian_merged"]["values"]  # the last epoch's point is the final one
    last = rows.iloc[-1]
    assert abs(last["hessian_merged.eigenvalue_1"] - final["eigenvalue_1"]) <= 2 * (
        last["hessian_merged.error_1"] + final["error_1"]
    )


@pytest.mark.slow
def test_tracking_resumes_from_the_same_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = prepared(tmp_path / "a", EVERY_EPOCH), prepared(tmp_path / "b", EVERY_EPOCH)
    finish(whole.path)
    real, left = os.replace, [4]

    def replace(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(Killed):
        finish(broken.path)
    monkeypatch.undo()
    assert broken.state() == "interrupted"
    assert finish(broken.path) == "done"
    pd.testing.assert_frame_equal(tracked(whole), tracked(broken))


def test_sharpness_and_balancedness_are_tracked_too(tmp_path: Path) -> None:
    wanted = [{"name": "sam_sharpness", "every": 2, "examples": 40}, {"name": "balancedness", "every": 1}]
    directory = prepared(tmp_path, wanted)
    assert finish(directory.path) == "done"
    history = pd.read_parquet(directory.path / "history.parquet")
    balanced = history.dropna(subset=["balancedness.balancedness"])
    assert balanced["epoch"].tolist() == [1, 2, 3]
    assert history.dropna(subset=["sam_sharpness_merged.sharpness"])["epoch"].tolist() == [2]
    final = directory.measures()["balancedness"]["values"]["balancedness"]
    assert balanced["balancedness.balancedness"].iloc[-1] == final


@pytest.mark.slow
def test_an_interrupted_measure_is_stored_and_stays_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flatbench.measures.base import MeasureInterrupted

    directory = prepared(tmp_path, [{"name": "hessian", "examples": 20}])
    real = Hessian.__call__

    def interrupted(self: Hessian, subject: Any, track: Any = None) -> Any:
        raise MeasureInterrupted(real(self, subject, track))

    monkeypatch.setattr(Hessian, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(directory.path)
    stored = directory.measures()["hessian_merged"]
    assert stored["interrupted"]
    assert stored["values"]["eigenvalue_1"]
    assert directory.pending_measures(directory.spec())
    monkeypatch.undo()
    assert finish(directory.path) == "done"
    assert "interrupted" not in directory.measures()["hessian_merged"]


@pytest.mark.slow
def test_a_memory_budget_from_the_command_line(tmp_path: Path) -> None:
    directory = prepared(tmp_path, [])
    finish(directory.path)
    wanted = ["{name: hessian, examples: 40}"]
    ((_, _, free),) = measure([directory.path], wanted)
    budget = int(0.7 * free["values"]["memory_bytes"])
    ((_, _, small),) = measure([directory.path], wanted, str(budget))
    assert free["values"]["graph"] == "kept"
    assert small["values"]["graph"] != "kept" or small["values"]["method"] == "central differences"
    assert small["values"]["memory_bytes"] <= budget
    assert small["values"]["eigenvalue_1"] == pytest.approx(free["values"]["eigenvalue_1"], rel=1e-2)
    for text in ("much", "0", "-1GB", "1.2.3MB"):
        with pytest.raises(InputError, match="is no amount"):
            list(measure([directory.path], wanted, text))
