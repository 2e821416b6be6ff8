"""Every family learns what is easy, and what its adapters learned is saved, opened again and measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench import store, tasks
from flatbench.runs import open as opening
from flatbench.runs.finish import finish
from flatbench.study import Study
from flatbench.study.plan import Plan
from flatbench.training.trainer import fixed_batches
from tests.tasks.learning_cases import METHODS, PROBLEMS, Problem

pytestmark = pytest.mark.slow


MEASURES = [
    {"name": "hessian", "examples": 6, "max_iterations": 5},
    {"name": "slice", "points": 3, "directions": 1, "examples": 6},
    "cost",
]


def study(problem: Problem, methods: Sequence[str]) -> Study:
    flat = {name: {"optimizer": {"name": name, "rho": problem.rho}} for name in METHODS[2:]}
    changes: dict[str, dict[str, Any]] = {"full_ft": {"train": {"lr": problem.full_lr}}, "lora": {}, **flat}
    if problem.falls is not None:
        for name in set(METHODS) - set(problem.learners):
            changes[name] = {**changes[name], "train": {"epochs": problem.falls}}
    content = {
        "name": "easy",
        "task": problem.task,
        "model": {"name_or_path": str(problem.model)},
        "adapter": problem.adapter,
        "methods": [{"name": name, **changes[name]} for name in methods],
        "seeds": [0],
        "train": {"threads": 1, "log_every": 1, **problem.train},
        "measures": MEASURES,
    }
    return Study(content, "easy.yaml")


def test_every_family_of_pretrained_models_has_a_problem() -> None:
    families = {name.partition("-")[0] for name in PROBLEMS}
    names = tasks.REGISTRY.names()
    assert families == {name for name in names if "name_or_path" in tasks.model_options(name).model_fields}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.long)])
def test_learns_saves_reloads_and_is_measured(name: str, few: bool, tmp_path: Path) -> None:
    problem = PROBLEMS[name](tmp_path)
    results = store.StudyFolder(tmp_path / "results", "easy")
    for run in Plan(study(problem, problem.few if few else METHODS), results).final([]):
        directory = results.run(run.id)
        directory.prepare(run.spec())
        assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        losses = store.history_of(directory)["loss"].dropna()
        assert losses.iloc[-1] < losses.iloc[0], run.method
        result = directory.result()
        assert result is not None
        if run.method in problem.learners:
            assert result["metrics"]["test"][run.metric] == 1, run.method
        if problem.task["name"] in ("causal_lm", "vqa"):  # texts are generated for the test split alone
            assert run.metric not in result["metrics"]["validation"]
        measured = directory.measures()
        assert measured["hessian_merged"]["values"]["eigenvalue_1"] != 0
        assert measured["slice_merged"]["values"]["loss"] > 0
        assert measured["cost"]["values"]["step_ms"] > 0
        opened = opening.open_run(directory, trained=True)
        batches = fixed_batches(opened.task, opened.splits.test, 5, torch.device("cpu"))
        again = opened.task.evaluate(opened.model, batches)
        assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-4, abs=1e-6)
