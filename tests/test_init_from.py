"""A study may start its adapters from another run's, and what they were is a part of each run's identity."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flatbench import store
from flatbench.errors import InputError
from flatbench.models import weights as model_weights
from flatbench.runs import open as opening
from flatbench.runs.finish import finish
from flatbench.study import Study, load
from flatbench.study.plan import Plan
from tests.tasks.task_cases import bert_folder, write_rte, write_tsv


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, RTE (two classes) and STS-B (a score), and an adapter trained on the first."""
    folder = tmp_path_factory.mktemp("init")
    data = write_rte(folder / "data")
    rows = [[i, f"a {i}", f"b {i}", i % 6] for i in range(120)]
    for name in ("train", "dev"):
        head = ["index", "sentence1", "sentence2", "score"]
        write_tsv(data / "STS-B" / f"{name}.tsv", [head, *rows])
    found = {"model": bert_folder(folder / "bert"), "data": data, "results": folder / "results"}
    [run] = run_all(content(found, "rte"), found["results"])
    return {**found, "adapter": run.adapter}


def content(places: dict[str, Path], task: str, **adapter: Any) -> dict[str, Any]:
    return {
        "name": f"on-{task}",
        "task": {
            "name": "glue",
            "task": task,
            "data": str(places["data"]),
            "max_length": 16,
            "test_examples": 24,
        },
        "model": {"name_or_path": str(places["model"])},
        "adapter": {"r": 2, "alpha": 4, **adapter},
        "methods": ["lora"],
        "seeds": [0],
        "train": {"epochs": 1, "threads": 1, "lr": 1e-2},
    }


def run_all(study: dict[str, Any], results: Path) -> list[store.RunDirectory]:
    folder = store.StudyFolder(results, study["name"])
    found = []
    for run in Plan(Study(study, "study.yaml"), folder).final([]):
        directory = folder.run(run.id)
        directory.prepare(run.spec())
        assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        found.append(directory)
    return found


def test_it_starts_from_the_others_factors_with_a_head_of_its_own(
    places: dict[str, Path], tmp_path: Path
) -> None:
    [run] = run_all(content(places, "stsb", init_from=str(places["adapter"])), tmp_path)
    begun = opening.open_run(run, trained=False).model
    stored = load_file(model_weights.weights_file(places["adapter"]))
    factors = {name: p for name, p in begun.named_parameters() if ".lora_" in name}
    assert factors
    for name, parameter in factors.items():
        assert torch.equal(parameter, stored[name.replace(".default", "")])
    assert any(parameter.abs().sum() > 0 for name, parameter in factors.items() if "lora_B" in name)
    [plain] = run_all(content(places, "stsb"), tmp_path)
    heads = [
        {n: p for n, p in opening.open_run(r, trained=False).model.named_parameters() if "classifier" in n}
        for r in (run, plain)
    ]
    assert all(torch.equal(p, heads[1][name]) for name, p in heads[0].items())
    moved = opening.open_run(run, trained=True).model
    assert any(not torch.equal(p, dict(moved.named_parameters())[n]) for n, p in factors.items())


def test_what_it_starts_from_is_a_part_of_the_identity(places: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(places["adapter"], copy)
    study = content(places, "stsb", init_from=str(copy))
    [run] = run_all(study, tmp_path)
    weights = model_weights.weights_file(copy)
    other = load_file(weights)
    save_file({name: 2 * p for name, p in other.items()}, weights)
    with pytest.raises(InputError, match="not the weights that were there when the run was made"):
        opening.open_run(run, trained=False)
    assert opening.open_run(run, trained=True)  # what was trained does not need its start
    [planned] = Plan(Study(study, "study.yaml"), store.StudyFolder(tmp_path, "x")).final([])
    assert planned.id != run.id


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"init_from": "nowhere"}, "adapter.init_from: nowhere: no adapter here"),
        ({"r": 4}, "its r is 2, and the study's 4"),
        ({"alpha": 8}, "its lora_alpha is 4.0, and the study's 8.0"),
        ({"rslora": True}, "its use_rslora is False, and the study's True"),
        ({"init": "pissa"}, "init_from gives A and B of plain LoRA"),
        ({"dora": True}, "init_from gives A and B of plain LoRA"),
    ],
)
def test_adapters_that_cannot_be_started_from(
    places: dict[str, Path], tmp_path: Path, adapter: dict[str, Any], said: str
) -> None:
    study = content(places, "stsb", **{"init_from": str(places["adapter"]), **adapter})
    with pytest.raises(InputError) as refused:
        Plan(Study(study, "study.yaml"), store.StudyFolder(tmp_path, "x")).final([])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_adapter_of_other_modules(places: dict[str, Path], tmp_path: Path) -> None:
    study = content(places, "stsb", init_from=str(places["adapter"]), target_modules=["query"])
    folder = store.StudyFolder(tmp_path, "x")
    [planned] = Plan(Study(study, "study.yaml"), folder).final([])
    directory = folder.run(planned.id)
    directory.prepare(planned.spec())
    with pytest.raises(InputError, match=r"does not fit the model; differing weights: .*value"):
        opening.open_run(directory, trained=False)


@pytest.mark.parametrize("inside_a_grid", [False, True])
def test_a_study_from_somebody_else_reads_no_adapter_elsewhere(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside_a_grid: bool
) -> None:
    start = str(places["adapter"])
    study = content(places, "stsb", **({} if inside_a_grid else {"init_from": start}))
    if inside_a_grid:
        study["methods"] = [{"name": "lora", "grid": {"adapter.init_from": [start]}}]
    (tmp_path / "work").mkdir()
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match="lies outside the study's folder"):
        load(str(tmp_path / "study.yaml"), roots=[places["data"], places["model"]])
    assert load(str(tmp_path / "study.yaml"), roots=[places["data"], places["model"], start])
