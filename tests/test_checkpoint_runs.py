"""Runs of a study as checkpoints: their numbers, the cache, and what notebooks show."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import flatbench
from flatbench import store
from flatbench.errors import InputError
from flatbench.executors.local import Local
from flatbench.machine import cache
from flatbench.notebook.display import Measured, in_notebook
from flatbench.notebook.load import load_checkpoint
from flatbench.orchestration import progress, run_study
from flatbench.study import Study
from tests.conftest import SMALL


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small study."""
    content = {
        **SMALL,
        "methods": ["lora", "eflat_lora"],
        "measures": ["hessian", "slice", "cost"],
        "seeds": [0],
    }
    loaded = Study(content, "small.yaml")
    results = tmp_path_factory.mktemp("results")
    with progress.display(Console(quiet=True)) as display, Local(jobs=1) as executor:
        outcome = run_study.run(loaded, store.StudyFolder(results, loaded.name), executor, display)
    assert not outcome.failed
    return results / loaded.name


@pytest.mark.slow
def test_a_run_directory_gives_the_numbers_of_the_command_line(study: Path) -> None:
    table = flatbench.load_results(study)
    assert table["method"].tolist() == ["lora", "eflat_lora"]
    row = table.iloc[0]
    opened = flatbench.load_checkpoint(row["path"])
    assert list(opened.data) == ["train", "validation", "test"]
    found = opened.hessian(cached=False)
    assert found["eigenvalue_1"] == row["hessian_merged.eigenvalue_1"]
    sliced = opened.measure("slice", cached=False)
    assert sliced["mean_rise"] == row["slice_merged.mean_rise"]
    assert opened.cost()["step_ms"] == row["cost.step_ms"]
    lines = opened.landscape(points=21, draws=3, splits=["train"], distance=1.0, cached=False)
    assert lines.values(draw=2)["value"].tolist() == sliced["losses"][2]
    at_origin = opened.landscape(points=3, cached=False).meta["origin"]
    assert at_origin["test"]["accuracy"] == pytest.approx(row["test.accuracy"])
    assert at_origin["test"]["loss"] == pytest.approx(row["test.loss"], rel=1e-5)


def test_every_kind_of_sharpness(study: Path) -> None:
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    sam = opened.sharpness(rho=0.1, cached=False)
    worst = opened.sharpness("worst", rho=0.1, m=None, cached=False)
    average = opened.sharpness("average", rho=[0.1, 0.2], cached=False)
    assert (sam.name, worst.name, average["kind"]) == ("sam_sharpness", "sharpness", "average")
    assert worst["sharpness"] == pytest.approx(sam["sharpness"], rel=0.2)  # two searches of one maximum
    assert average["sharpness_1"] < worst["sharpness"]
    with pytest.raises(InputError, match="unknown measure 'flat_sharpness'"):
        opened.sharpness("flat")


def test_two_runs_make_a_line(study: Path) -> None:
    first, second = (load_checkpoint(path) for path in flatbench.load_results(study)["path"])
    found = first.landscape(second, points=5, cached=False)
    assert "towards eflat_lora (0 = here, 1 = there)" in found.axes


def test_the_same_question_again_is_free(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path))
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    first = (opened.hessian(), opened.landscape(points=5))
    assert not first[0].cached
    assert {"landscapes", "measures"} <= {p.name for p in cache.folder().iterdir()}

    loss = opened.loss

    def of_few(model: Any, batch: Any) -> Any:  # by which the function is known again
        assert len(batch["labels"]) <= 8, "computed"
        return loss(model, batch)

    object.__setattr__(opened, "loss", of_few)
    again = (opened.hessian(), opened.landscape(points=5))
    assert again[0].cached
    assert dict(again[0]) == dict(first[0])
    assert again[1].frame.equals(first[1].frame)
    with torch.no_grad():
        next(p for n, p in opened.model.named_parameters() if "lora_B" in n).add_(1e-3)
    with pytest.raises(AssertionError, match="computed"):
        opened.hessian()


def test_runs_that_cannot_be_opened(study: Path, tmp_path: Path) -> None:
    run = Path(flatbench.load_results(study)["path"][0])
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    with pytest.raises(InputError, match="brings its own data"):
        load_checkpoint(copy, [{"text": "a very good film", "label": 0}])
    weights = copy / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        load_checkpoint(copy)
    (copy / "result.json").unlink()
    with pytest.raises(InputError, match="not trained yet"):
        load_checkpoint(copy)
    with pytest.raises(InputError, match="no results of a study here"):
        flatbench.load_results(tmp_path)
    with pytest.raises(InputError, match="make them with `flatbench run`"):
        flatbench.load_results("quickstart", tmp_path)


def test_what_notebooks_show(study: Path) -> None:
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    shown = opened._repr_html_()
    assert "flatbench run" in shown
    assert "train 60, validation 50, test 100" in shown
    assert "lora" in repr(opened)
    found = opened.landscape(points=3, cached=False)
    assert "60" in found._repr_html_()
    assert "filter-normalised" in found._repr_html_()
    measured = Measured("hessian<", {"eigenvalue_1": 2.0, "long": "x" * 200}, True)
    assert "hessian&lt; (from the cache)" in measured._repr_html_()
    assert measured.to_frame()["name"].tolist() == ["eigenvalue_1", "long"]
    assert "eigenvalue_1=2" in repr(measured)


def test_a_progress_bar_on_request(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    opened.landscape(points=5, cached=False, progress=True)
    assert "landscape" in capsys.readouterr().err
    pytest.importorskip("ipykernel")  # which makes no notebook of a program that has loaded it
    opened.landscape(points=5, cached=False)
    assert capsys.readouterr().err == ""


def test_a_kernel_of_a_notebook_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    ipython = pytest.importorskip("IPython")
    assert not in_notebook()
    monkeypatch.setattr(ipython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    assert in_notebook()
    monkeypatch.setattr(ipython, "get_ipython", lambda: SimpleNamespace())  # IPython in a terminal
    assert not in_notebook()


def test_stopped_and_asked_again_a_landscape_goes_on(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path))
    opened = load_checkpoint(flatbench.load_results(study)["path"][0])
    whole = opened.landscape(points=9, stack=1, cached=False)
    inner: Callable[..., Any] = opened.loss
    left = 16  # four of them at the entrances of the space, which are two

    def stopping(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return inner(*arguments)

    object.__setattr__(opened, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        opened.landscape(points=9, stack=1)
    object.__setattr__(opened, "loss", inner)
    found = opened.landscape(points=9, stack=1)
    assert 0 < found.meta["resumed_points"] < 9
    assert found.frame.equals(whole.frame)


def test_backbones_are_in_the_same_cache_folder(study: Path) -> None:
    assert list(cache.folder().glob("digits-*.safetensors"))
