"""The predefined studies of the paper are valid, and their small twins run on the real files, shortened."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import BertForMaskedLM

from flatbench import store, study
from flatbench.config import study_files
from flatbench.runs import open as opening
from flatbench.runs.finish import finish
from flatbench.study import plan
from flatbench.study import study as studies
from flatbench.training.trainer import fixed_batches
from tests.tasks.task_cases import WORDS, bert_folder, real

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).parents[1] / "studies" / "small_models.py"
METHODS = ["lora", "flat_lora", "eflat_lora"]
ONE_TRIAL = [
    "methods=[lora, flat_lora, eflat_lora]",
    "tune=null",
    "train.epochs=1",
    "seeds=[0]",
    "measures=[{name: hessian, examples: 4, max_iterations: 3}, "
    "{name: slice, points: 3, directions: 1, examples: 4}, cost]",
]
#: radii of arXiv 2508.00522
RADII = [0.05, 0.1, 0.2]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("small_models", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.STEPS = 10  # what it teaches in a hundred is not looked at here
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The models that the script writes, as its own documentation says, each when a test asks for it."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def made(kind: str) -> Path:
        if kind == "bert":
            return bert_folder(folder / kind, BertForMaskedLM, WORDS, hidden_size=32)
        with pytest.MonkeyPatch.context() as patch:  # in this process, which has loaded torch already
            patch.setattr(sys, "argv", [str(SCRIPT), kind, str(folder / kind)])
            script().main()
        return folder / kind

    return made


@pytest.mark.parametrize(
    "name", [name for name in study_files.predefined() if name.startswith(("paper-", "gsm8k"))]
)
def test_every_method_of_the_papers_studies_has_the_same_budget(name: str) -> None:
    variables = ["variables={data: folder, encoder: folder, model: folder}"]
    try:
        loaded = study.load(name, variables)
    except studies.InputError as error:
        assert "generation" in str(error)
        pytest.skip(str(error))
    if loaded.file.tune is None:  # figures, costs and grids without selection are no comparison
        return
    for condition in loaded.conditions:
        assert len({len(trials) for trials in condition.trials.values()}) == 1
        assert {"lora", "eflat_lora"} <= set(condition.trials)
        if not name.endswith("-small"):
            for method in {"flat_lora", "eflat_lora"} & set(condition.trials):
                assert sorted({choice["rho"] for choice in condition.trials[method]}) == RADII


def finished(tmp_path: Path, name: str, settings: list[str]) -> list[store.RunDirectory]:
    """The final runs of a study, each to its end."""
    loaded = study.load(name, [*ONE_TRIAL, *settings])
    folder = store.StudyFolder(tmp_path / "results", loaded.name)
    directories = []
    for run in plan.Plan(loaded, folder).final([]):
        directory = folder.run(run.id)
        directory.prepare(run.spec())
        assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        directories.append(directory)
    return directories


def check(directories: list[store.RunDirectory], metric: str) -> None:
    """Each method lowers the loss, is the same when opened again, and has its measures."""
    assert [directory.spec()["method"] for directory in directories] == METHODS
    for directory in directories:
        result = directory.result()
        assert result is not None
        assert metric in result["metrics"]["test"]
        assert result["data"]["examples"]["train"] > 0
        before, after = (train_loss(directory, trained) for trained in (False, True))
        assert after < before, directory.spec()["method"]
        assert after == pytest.approx(result["metrics"]["train"]["loss"], rel=1e-4)
        measured = directory.measures()
        assert measured["hessian_merged"]["values"]["space"] == "merged"
        assert measured["hessian_merged"]["values"]["eigenvalue_1"] != 0
        assert measured["slice_merged"]["values"]["loss"] > 0
        assert measured["cost"]["values"]["step_ms"] > 0


def train_loss(directory: store.RunDirectory, trained: bool) -> float:
    """Of the model as it was at the start, or as it was saved."""
    run = opening.open_run(directory, trained)
    size = run.train.eval_batch_size
    batches = fixed_batches(run.task, run.splits.train, size, torch.device("cpu"))
    return run.task.evaluate(run.model, batches)["loss"]


@pytest.mark.data
def test_fashion_mnist_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('fashion_mnist')}",
        f"variables.model={models('vit')}",
        "task.train_examples=64",
        "task.validation_examples=20",
        "task.test_examples=20",
    ]
    check(finished(tmp_path, "fashion-mnist-small", settings), "accuracy")


@pytest.mark.data
def test_paper_clip_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('fashion_mnist')}",
        f"variables.model={models('clip')}",
        'grid={"task.shots, train.epochs": [[2, 2]]}',
        "task.test_examples=20",
    ]
    check(finished(tmp_path, "paper-clip-small", settings), "accuracy")


@pytest.mark.data
@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="needs the generation extra")
def test_paper_e2e_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('e2e')}",
        f"variables.model={models('gpt2')}",
        "task.train_examples=16",
        "task.validation_examples=2",
        "task.test_examples=2",
        "task.generation.max_new_tokens=8",
    ]
    check(finished(tmp_path, "paper-e2e-small", settings), "bleu")


@pytest.mark.long  # the study is run above, and this data is read in `tasks/test_causal_lm.py`
@pytest.mark.data
def test_gsm8k_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    """The twin of generation on the other data set of its family."""
    settings = [
        f"variables.data={real('gsm8k')}",
        f"variables.model={models('gpt2')}",
        "task.dataset=gsm8k",
        "task.prompt=null",
        "task.train_examples=16",
        "task.validation_examples=2",
        "task.test_examples=2",
        "task.generation={max_new_tokens: 8}",
    ]
    check(finished(tmp_path, "paper-e2e-small", settings), "exact_match")


@pytest.mark.long  # `test_learning` and `test_papers_start` train the family, on tiny data in this layout
@pytest.mark.data
def test_paper_vqa_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('scienceqa')}",
        f"variables.model={models('qwen_vl')}",
        "task.train_examples=8",
        "task.validation_examples=2",
        "task.test_examples=4",
    ]
    check(finished(tmp_path, "paper-vqa-small", settings), "accuracy_with_image")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "settings", "metric"),
    [
        (
            "paper-few-shot-small",
            ["grid={task.task: [sst2]}", "task.shots=8", "task.test_examples=10"],
            "accuracy",
        ),
        (
            "paper-glue-small",
            ["grid={task.task: [stsb]}", "task.train_examples=8", "task.validation_examples=8"],
            "pearson",
        ),
    ],
)
def test_text_studies_small(
    models: Callable[[str], Path], tmp_path: Path, name: str, settings: list[str], metric: str
) -> None:
    settings = [f"variables.data={real('glue')}", f"variables.encoder={models('bert')}", *settings]
    if name == "paper-glue-small":
        settings += ["task.test_examples=8"]
    check(finished(tmp_path, name, settings), metric)


# -- figures, costs and grids without selection -----------------------------------------------------------


def finished_as_it_is(tmp_path: Path, name: str, settings: list[str]) -> list[store.RunDirectory]:
    """The final runs of a study with its own methods and measures, each to its end."""
    loaded = study.load(name, settings)
    folder = store.StudyFolder(tmp_path / "results", loaded.name)
    directories = []
    for run in plan.Plan(loaded, folder).final([]):
        directory = folder.run(run.id)
        directory.prepare(run.spec())
        assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        directories.append(directory)
    return directories


@pytest.mark.data
def test_paper_analysis_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Both figures' columns, of the methods that have them."""
    data = [f"variables.data={real('glue')}", f"variables.encoder={models('bert')}"]
    runs = finished_as_it_is(
        tmp_path, "paper-analysis-small", [*data, "task.shots=8", "task.test_examples=8", "train.steps=3"]
    )
    for directory in runs:
        history = pd.read_parquet(directory.path / "history.parquet")
        method = directory.spec()["method"]
        assert ("ema_gap.gap" in history) == method.startswith("eflat_lora")
        layers = [c for c in history if c.startswith("balancedness.layer_")]
        assert len(layers) >= 2
        assert history[layers].notna().any().all()
    assert [
        d.spec()["config"]["optimizer"].get("rho_schedule") for d in runs if "eflat" in d.spec()["method"]
    ] == [
        "constant",
        "inv_sqrt",
    ]


@pytest.mark.data
def test_paper_cost_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('e2e')}",
        f"variables.model={models('gpt2')}",
        "methods=[lora, flat_lora]",
        "task.train_examples=8",
        "task.validation_examples=1",
        "task.test_examples=1",
        "train.steps=1",
        "train.batch_size=1",
        "measures=[{name: cost, pairs: 3}]",
    ]
    runs = finished_as_it_is(tmp_path, "paper-cost-small", settings)
    gradients = [d.measures()["cost"]["values"]["paired_gradients_per_step"] for d in runs]
    assert gradients == [1, 2]
    assert all(d.measures()["cost"]["values"]["paired_ratio"] > 0 for d in runs)


@pytest.mark.long  # the task is run above, and grids without `tune` in `test_study.py`
@pytest.mark.data
def test_paper_rho_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Every configuration is final, and has its test metric."""
    settings = [
        f"variables.data={real('scienceqa')}",
        f"variables.model={models('qwen_vl')}",
        "methods=[{name: eflat_lora, grid: {rho: [0.05, 0.2]}}]",
        "task.train_examples=4",
        "task.validation_examples=2",
        "task.test_examples=2",
        "train.epochs=1",
        "measures=[]",
    ]
    runs = finished_as_it_is(tmp_path, "paper-rho-small", settings)
    assert [d.spec()["hyper"]["rho"] for d in runs] == [0.05, 0.2]
    for directory in runs:
        assert "accuracy" in (directory.result() or {})["metrics"]["test"]


@pytest.mark.data
def test_paper_t5_glue_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('glue')}",
        f"variables.model={models('t5')}",
        'grid={"task.task, train.epochs, task.max_length": [[cola, 1, 64]]}',
        "task.train_examples=8",
        "task.validation_examples=8",
        "task.test_examples=8",
        "methods=[bi_lora]",
        "tune=null",
        "measures=[]",
    ]
    [directory] = finished_as_it_is(tmp_path, "paper-t5-glue-small", settings)
    result = directory.result()
    assert result is not None
    assert "matthews" in result["metrics"]["test"]
    assert train_loss(directory, True) == pytest.approx(result["metrics"]["train"]["loss"], rel=1e-4)


@pytest.mark.data
def test_competitors_small(models: Callable[[str], Path], tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('glue')}",
        f"variables.encoder={models('bert')}",
        "methods=[lora_mgpo, ivon, {name: lora-muon, optimizer: {name: plain, base: torch.optim.Muon}}]",
        "task.train_examples=8",
        "task.validation_examples=8",
        "task.test_examples=8",
        "train.epochs=1",
        "tune=null",
        "measures=[]",
    ]
    runs = finished_as_it_is(tmp_path, "competitors-small", settings)
    assert [d.spec()["method"] for d in runs] == ["lora_mgpo", "ivon", "lora-muon"]
    # what a study leaves open is the run's: here the number of training examples
    assert runs[1].spec()["config"]["optimizer"]["ess"] is None
