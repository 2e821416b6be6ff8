"""The study glue-rte-minilm on the real files and the real encoder, through the command line, shortened."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from flatbench import store
from tests import warm
from tests.tasks.task_cases import minilm, real

pytestmark = pytest.mark.slow


#: the others train on texts in `test_small_studies`
METHODS = ["full_ft", "lora", "eflat_lora"]

SHORTENED = [
    "seeds=[0]",
    "train.epochs=1",
    "train.batch_size=8",
    "train.eval_batch_size=16",
    "task.train_examples=16",
    "task.validation_examples=16",
    "task.test_examples=16",
    "task.max_length=32",
    "tune.grid={lr: [5e-4]}",
    "methods=[{name: full_ft, grid: {lr: [5e-5]}}, lora, eflat_lora]",
    "measures=[{name: hessian, examples: 4, max_iterations: 2}, cost, "
    "{name: sam_sharpness, examples: 4, steps: 1}, {name: slice, examples: 4, points: 3, directions: 1}]",
]


def flatbench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.completed(*arguments, cwd=folder)


@pytest.fixture(scope="module")
def settings() -> list[str]:
    variables = [f"variables.data={real('glue')}", f"variables.encoder={minilm()}"]
    return [part for setting in [*variables, *SHORTENED] for part in ("--set", setting)]


@pytest.fixture(scope="module")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the study ran to its end."""
    folder = tmp_path_factory.mktemp("glue-study")
    done = flatbench(folder, "run", "glue-rte-minilm", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eflat_lora: chosen on validation" in done.stdout
    return folder


@pytest.mark.data
def test_every_method_is_trained_measured_and_tabulated(finished: Path) -> None:
    table = store.table(store.StudyFolder(finished / "results", "glue-rte-minilm"))
    final = table[table["stage"] == "final"].set_index("method")
    assert list(final.index) == METHODS
    assert set(table["state"]) == {"done"}
    for column in ("test.accuracy", "validation.accuracy", "train.accuracy"):
        assert final[column].between(0, 1).all()
    for column in ("test.loss", "slice_merged.loss", "sam_sharpness_merged.loss"):
        assert (final[column] > 0).all()
    assert final["hessian_merged.eigenvalue_1"].notna().all()
    assert (final["sam_sharpness_merged.sharpness"] >= 0).all()
    # tuning never reads the test split
    assert table.loc[table["stage"] == "tune", "test.accuracy"].isna().all()


@pytest.mark.data
def test_what_was_read_is_recorded(finished: Path) -> None:
    folder = store.StudyFolder(finished / "results", "glue-rte-minilm")
    for directory in folder.directories():
        data = json.loads((directory.path / "result.json").read_text())["data"]
        assert data["examples"] == {"train": 16, "validation": 16, "test": 16}
        assert data["truncated"]["train"] > 0  # 32 tokens are few


@pytest.mark.data
def test_methods_share_their_start_and_data(finished: Path) -> None:
    """The first loss is taken before any update, so methods with one seed have the same."""
    history = store.history(store.StudyFolder(finished / "results", "glue-rte-minilm"))
    final = history[(history["stage"] == "final") & (history["step"] == 1)]
    first = pd.to_numeric(final.set_index("method")["loss"])
    adapted = first.drop("full_ft")
    assert adapted.nunique() == 1
    assert first["full_ft"] == pytest.approx(adapted.iloc[0], rel=1e-5)  # B = 0: the same function


@pytest.mark.data
def test_run_again_does_nothing(finished: Path, settings: list[str]) -> None:
    runs = finished / "results" / "glue-rte-minilm" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    done = flatbench(finished, "run", "glue-rte-minilm", *settings)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before


@pytest.mark.parametrize("missing", ["data", "encoder"])
def test_the_folders_are_asked_for(tmp_path: Path, missing: str) -> None:
    other = {"data": "encoder", "encoder": "data"}[missing]
    done = flatbench(tmp_path, "run", "glue-rte-minilm", "--set", f"variables.{other}={tmp_path}")
    assert done.returncode == 2
    assert f"variables.{missing} has no value" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["data", "encoder"])
def test_a_wrong_folder_ends_in_one_line(tmp_path: Path, wrong: str, settings: list[str]) -> None:
    done = flatbench(
        tmp_path, "run", "glue-rte-minilm", *settings, "--set", f"variables.{wrong}={tmp_path / 'nowhere'}"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no such folder" in done.stderr
    assert not list(tmp_path.iterdir())
