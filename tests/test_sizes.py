"""Models that are larger than anything, pickles alone, pipes and devices are said before anything is made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flatbench import report, store
from flatbench.cli import status
from flatbench.errors import InputError
from flatbench.executors.local import Local
from flatbench.models import folders, pretrained, sizes, weights
from flatbench.models.pretrained import PretrainedModel
from flatbench.orchestration import site
from flatbench.report.tables import published
from flatbench.store import StudyFolder, events
from flatbench.study.plan import _size_notes
from flatbench.tasks.images import clip_data, image_data
from flatbench.tasks.text import glue_data
from flatbench.tasks.vqa import data as vqa_data
from tests.file_fuzzing import limited
from tests.tasks.task_cases import bert_folder, gpt2_folder
from tests.test_store import make, place


def changed(folder: Path, **changes: Any) -> PretrainedModel:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return PretrainedModel(name_or_path=str(folder))


@pytest.mark.parametrize(
    ("content", "layers", "weights"),
    [
        (
            {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "vocab_size": 30522},
            12,
            1.1e8,
        ),
        ({"n_embd": 768, "n_layer": 12, "vocab_size": 50257, "n_inner": None}, 12, 1.24e8),
        (
            {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_decoder_layers": 6, "vocab_size": 32128},
            12,
            6e7,
        ),
        (
            {
                "hidden_size": 4096,
                "num_hidden_layers": 32,
                "intermediate_size": 14336,
                "num_local_experts": 8,
                "vocab_size": 32000,
            },
            32,
            3.4e10,
        ),
        ({"text_config": {"hidden_size": 10, "num_hidden_layers": 3}, "hidden_size": True}, 3, 3600),
    ],
)
def test_sizes_of_known_models(content: dict[str, Any], layers: int, weights: float) -> None:
    """BERT, GPT-2, T5, Mixtral (whose perceptrons have a third matrix): published sizes within a third."""
    found = sizes.described(content)
    assert found[0] == layers
    assert found[1] == pytest.approx(weights, rel=1 / 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**9},
        {"vocab_size": 10**15},
        {"intermediate_size": 10**13},
    ],
)
def test_a_model_that_none_is(changes: dict[str, Any], tmp_path: Path) -> None:
    model = changed(bert_folder(tmp_path / "bert"), **changes)
    with limited(), pytest.raises(InputError, match=r"describes .* weights, which would take .* [GT]B"):
        pretrained.config(model)
    with limited(), pytest.raises(InputError, match=r"describes .* weights, which would take .* [GT]B"):
        folders.open_folder(tmp_path / "bert")


def test_layers_of_which_transformers_makes_a_list(tmp_path: Path) -> None:
    model = changed(gpt2_folder(tmp_path / "m"), model_type="qwen2", num_hidden_layers=10**9)
    with limited(), pytest.raises(InputError, match="1,000,000,000 layers"):
        pretrained.config(model)


def test_a_model_larger_than_the_machine_is_noted(tmp_path: Path) -> None:
    class Task:
        model = changed(bert_folder(tmp_path / "bert"), num_hidden_layers=8000, hidden_size=2048)

    (note,) = _size_notes(Task())
    assert "weights, which take" in note
    assert f"this machine has {psutil.virtual_memory().total / 1e9:,.3g} GB" in note
    Task.model = PretrainedModel(name_or_path=str(bert_folder(tmp_path / "small")))
    assert _size_notes(Task()) == []
    assert _size_notes(object()) == []


def test_pickles_alone_are_said_at_once(tmp_path: Path) -> None:
    """By the fingerprint, which planning asks for, so that `show` says it."""
    model = PretrainedModel(name_or_path=str(bert_folder(tmp_path / "bert")))
    configuration = pretrained.config(model)
    assert pretrained.fingerprint(model, configuration)
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors in this folder; .* flatbench convert"):
        pretrained.fingerprint(model, configuration)
    os.mkfifo(tmp_path / "bert" / "model.safetensors")
    for ask in (
        lambda: pretrained.fingerprint(model, configuration),
        lambda: folders.open_folder(tmp_path / "bert"),
    ):
        with pytest.raises(InputError):
            ask()


PIPES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a table of GLUE": ("train.tsv", lambda f: glue_data.read("rte", str(f), None)),
    "IDX": ("train-images-idx3-ubyte", lambda f: image_data.read(str(f), None, None, "image", "label")),
    "a split file": ("split.json", lambda f: clip_data.read_split(f / "split.json", f)),
    "problems": ("problems.jsonl", lambda f: vqa_data.read_scienceqa(f)),
    "annotations": ("train.json", lambda f: vqa_data.read_vizwiz(f)),
    "an adapter": ("adapter_model.safetensors", lambda f: weights.check(f)),
    "an adapter's configuration": ("adapter_config.json", lambda f: folders.open_folder(f)),
    "results": ("results.parquet", lambda f: report.open_results(str(f / "results.parquet"))),
    "published figures": ("p.yaml", lambda f: published.load_publications([f / "p.yaml"])),
    "a site": ("site.yaml", lambda f: site.read(f / "site.yaml")),
}


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize("device", [False, True])
def test_pipes_and_devices_are_not_read(kind: str, device: bool, tmp_path: Path) -> None:
    name, read = PIPES[kind]
    if device:
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / name)
    with limited(), pytest.raises(InputError):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["done.json", "result.json", "environment.json", "run.json", "events.jsonl", "progress.json",
             "claim-000001.json", "measures/cost.json"]
)  # fmt: skip
def test_pipes_in_a_results_folder_are_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "s")
    run, other = make(folder), make(folder, seed=4)
    for one in (run, other):
        one.write("result", {"metrics": {"test": {"accuracy": 0.5}}, "training": {}})
        one.write("measures/cost", {"config": {"name": "cost"}, "values": {"step_ms": 3.0}})
    folder.write({"runs": [place(run), place(other)]})
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    with limited():
        found = status.survey(folder)
        table = store.table(folder)
        events.read(run.path)
    assert len(found) == len(table) == 2
    assert table["state"].iloc[1] == "trained"
    if name in ("done.json", "result.json", "run.json", "environment.json"):
        assert found[0].state == "damaged"
        assert table["state"].iloc[0] == "damaged"


@pytest.mark.parametrize("options", [{"executor": {"name": "local", "jobs": 10**6}},
                                     {"executor": {"name": "local", "gpus_per_run": 10**6}}])  # fmt: skip
def test_numbers_of_workers_beyond_reason(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(json.dumps(options))
    with pytest.raises(InputError, match="less than or equal to 1024"):
        site.executor(site.read(tmp_path / "site.yaml"), "site.yaml")
    with pytest.raises(InputError, match="less than or equal to 1024"):
        site.executor(site.read(None), "--jobs", None, 10**6)
    assert isinstance(site.executor(site.read(None), "--jobs", None, 2), Local)
