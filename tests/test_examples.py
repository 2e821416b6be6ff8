"""The examples run as they stand, one after the other, in a folder of their own; and what they call."""

from __future__ import annotations

import json
import runpy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import flatbench
from flatbench import store
from flatbench.callbacks.record import read
from flatbench.errors import InputError
from flatbench.report.analysis.results import Results
from tests.conftest import SMALL
from tests.test_cli import invoke

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        made = tmp_path_factory.mktemp("examples")
        patch.chdir(made)
        yield made


def example(name: str) -> dict[str, Any]:
    path = EXAMPLES / name
    assert len(path.read_text().splitlines()) <= 60
    with torch.random.fork_rng():
        return runpy.run_path(str(path), run_name="__main__")


@pytest.mark.slow
def test_an_optimizer_in_a_trainer_and_its_adapter_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = example("optimizer_in_a_trainer.py")
    assert (folder / "my-adapter/adapter_model.safetensors").is_file()
    assert trained["trainer"].state.log_history[-1]["eval_accuracy"] > 0.5
    found = example("measure_your_adapter.py")
    assert found["top"]["eigenvalue_1"] > 0
    assert found["top"]["upper_bound_1"] >= found["top"]["eigenvalue_1"]
    assert (folder / "slice.png").stat().st_size > 1000
    assert "SAM sharpness" in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_from_python(folder: Path) -> None:
    found = example("study_from_python.py")
    assert len(found["results"].final) == 6
    assert (folder / "reports/my-study/README.md").is_file()
    # its file is a study file
    again = flatbench.run("results/my-study.yaml", overrides={"train.batch_size": 32}, quiet=True)
    assert list(again.final["run"]) == list(found["results"].final["run"])


@pytest.mark.slow
def test_runs_that_fail_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = {**SMALL["train"], "epochs": 1}
    content = {**SMALL, "methods": ["lora", {"name": "sam", "grid": {"rho": [1e30]}}], "train": train}
    with pytest.warns(flatbench.UnfinishedWarning, match="1 diverged"):
        found = flatbench.run(content, tmp_path)
    assert isinstance(found, Results)
    assert sorted(found.final["state"]) == ["diverged", "done"]
    assert "2 runs: " in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flatbench.UnfinishedWarning)
        flatbench.run(content, tmp_path, quiet=True)
    assert capsys.readouterr().out == ""
    made = flatbench.report("small", tmp_path / "reports", folder=tmp_path)
    assert (tmp_path / "reports/small" / "README.md").is_file()
    assert any("diverged" in note for note in made.notes)


def test_bad_studies_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown study 'quickstrat'; did you mean 'quickstart'"):
        flatbench.run("quickstrat", tmp_path)
    with pytest.raises(InputError, match="name"):
        flatbench.run({**SMALL, "name": "../elsewhere"}, tmp_path)
    with pytest.raises(InputError, match="only what YAML can hold"):
        flatbench.run({**SMALL, "seeds": {1}}, tmp_path)
    with pytest.raises(InputError, match="did you mean 'epochs'"):
        flatbench.run(SMALL, tmp_path, overrides={"train.epoch": 3})
    assert not store.StudyFolder(tmp_path, "small").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]
    assert json.loads((tmp_path / "small.yaml").read_text())["name"] == "small"


def test_the_predefined_studies_are_listed() -> None:
    found = flatbench.list_studies()
    assert "quickstart" in found
    assert all(found.values())
    assert not any("\n" in text for text in found.values())


@pytest.mark.slow
def test_sharpness_is_watched_and_its_checkpoints_are_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len((EXAMPLES / "watch_sharpness.py").read_text().splitlines()) <= 40
    found = example("watch_sharpness.py")
    assert "critical_sharpness_merged 13 times" in capsys.readouterr().out
    table = read(folder / "watched")
    assert table["step"].tolist() == [*range(10, 133, 10)]
    assert table["critical_sharpness_adapter.moments"].eq("live optimizer").all()
    # the command of its first lines
    command = found["__doc__"].splitlines()[1].split()[1:]
    code, text = invoke(*command)
    assert code == 0, text
    measured = pd.read_parquet(folder / "measured/sharpness.parquet")
    assert measured["step"].tolist() == [26, 52, 78, 104, 130, 132]
    assert (folder / "measured/sharpness.png").stat().st_size > 1000
    # what the callback saw at step 130 is what is measured of the file of step 130
    column = "critical_sharpness_merged.critical_sharpness"
    live = table.set_index("step")[column][130]
    assert measured.set_index("step")[column][130] == pytest.approx(live, rel=0.05)
    code, text = invoke("report", "watched", "--output", "reports")
    assert code == 0, text
    assert (folder / "reports/watched/sharpness.png").stat().st_size > 1000
