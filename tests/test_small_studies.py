"""The predefined studies of the paper are valid, and their small twins run on the real files, shortened."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from task_cases import minilm, real

from flatbench import plan, runner, store, study, study_files

SCRIPT = Path(__file__).parents[1] / "studies" / "small_models.py"
ONE_TRIAL = [
    "methods=[lora, flat_lora, eflat_lora]",
    "tune=null",
    "train.epochs=1",
    "seeds=[0]",
    "measures=[{name: slice, points: 3, directions: 1, examples: 8}, cost]",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the script writes, as its own documentation says."""
    folder = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "vit", "clip", "qwen_vl"):
        subprocess.run([sys.executable, str(SCRIPT), kind, str(folder / kind)], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", [name for name in study_files.predefined() if name.startswith("paper-")])
def test_every_method_of_the_papers_studies_has_the_same_budget(name: str) -> None:
    variables = ["variables={data: folder, encoder: folder, model: folder}"]
    try:
        loaded = study.load(name, variables)
    except study.InputError as error:
        assert "generation" in str(error)
        pytest.skip(str(error))
    for condition in loaded.conditions:
        assert len({len(trials) for trials in condition.trials.values()}) == 1
        assert {"lora", "eflat_lora"} <= set(condition.trials)


def finished(tmp_path: Path, name: str, settings: list[str]) -> list[store.RunDirectory]:
    """The final runs of a study, each to its end."""
    loaded = study.load(name, [*ONE_TRIAL, *settings])
    folder = store.StudyFolder(tmp_path / "results", loaded.name)
    directories = []
    for run in plan.Plan(loaded, folder).final([]):
        directory = folder.run(run.id)
        directory.prepare(run.spec())
        assert runner.finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        directories.append(directory)
    return directories


def check(directories: list[store.RunDirectory], metric: str) -> None:
    assert directories
    for directory in directories:
        result = directory.result()
        assert result is not None
        assert metric in result["metrics"]["test"]
        assert result["data"]["examples"]["train"] > 0
        measured = directory.measures()
        assert measured["slice_merged"]["values"]["loss"] > 0
        assert measured["cost"]["values"]


@pytest.mark.data
def test_fashion_mnist_small(models: Path, tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('fashion_mnist')}",
        f"variables.model={models / 'vit'}",
        "task.train_examples=64",
        "task.validation_examples=20",
        "task.test_examples=20",
    ]
    check(finished(tmp_path, "fashion-mnist-small", settings), "accuracy")


@pytest.mark.data
def test_paper_clip_small(models: Path, tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('fashion_mnist')}",
        f"variables.model={models / 'clip'}",
        'grid={"task.shots, train.epochs": [[2, 2]]}',
        "task.test_examples=20",
    ]
    check(finished(tmp_path, "paper-clip-small", settings), "accuracy")


@pytest.mark.data
@pytest.mark.skipif(importlib.util.find_spec("sacrebleu") is None, reason="needs the generation extra")
def test_paper_e2e_small(models: Path, tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('e2e')}",
        f"variables.model={models / 'gpt2'}",
        "task.train_examples=16",
        "task.validation_examples=2",
        "task.test_examples=2",
        "task.generation.max_new_tokens=8",
    ]
    check(finished(tmp_path, "paper-e2e-small", settings), "bleu")


@pytest.mark.data
def test_paper_vqa_small(models: Path, tmp_path: Path) -> None:
    settings = [
        f"variables.data={real('scienceqa')}",
        f"variables.model={models / 'qwen_vl'}",
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
            ["grid={task.task: [sst2]}", "task.shots=4", "task.test_examples=10"],
            "accuracy",
        ),
        (
            "paper-glue-small",
            ["grid={task.task: [stsb]}", "task.train_examples=8", "task.validation_examples=8"],
            "pearson",
        ),
    ],
)
def test_text_studies_small(tmp_path: Path, name: str, settings: list[str], metric: str) -> None:
    variables = [f"variables.data={real('glue')}", f"variables.encoder={minilm()}"]
    settings = [*variables, "methods=[eflat_lora]", *settings]
    if name == "paper-glue-small":
        settings += ["task.test_examples=8"]
    check(finished(tmp_path, name, settings), metric)
