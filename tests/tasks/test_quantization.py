"""Base models in four or eight bits: frozen, reproducible, and measured only where that has a meaning."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flatbench import store, study
from flatbench.errors import InputError, NotApplicableError
from flatbench.measures.hessian import Hessian
from flatbench.models import factors, pretrained, quantization
from flatbench.models import weights as model_weights
from flatbench.models.pretrained import PretrainedModel
from flatbench.runs import measure as measuring
from flatbench.runs.finish import finish
from flatbench.runs.open import open_run
from flatbench.study import plan
from tests.tasks.task_cases import (
    bert_folder,
    decoder_folder,
    vit_folder,
    write_gsm8k,
    write_images,
    write_rte,
)
from tests.test_runner import Killed, kill_at_replacement, prepared, stable

__all__ = ["kill_at_replacement"]

HERE = importlib.util.find_spec("bitsandbytes") is not None
needed = pytest.mark.skipif(not HERE, reason="bitsandbytes is not installed")
MEASURES = [
    {"name": "hessian", "space": "merged", "examples": 4},
    {"name": "hessian", "space": "adapter", "examples": 4, "max_iterations": 3},
    {"name": "sam_sharpness", "space": "adapter", "examples": 4},
    {"name": "sam_sharpness", "space": "merged", "examples": 4},
    "cost",
]


def generation(folder: Path, **model: Any) -> dict[str, Any]:
    if not (folder / "qwen2").is_dir():
        decoder_folder(folder / "qwen2", "qwen2")
        write_gsm8k(folder / "data", train=30, test=6)
    task = {"name": "causal_lm", "dataset": "gsm8k", "data": str(folder / "data"), "generation": None}
    return {
        "task": {**task, "max_length": 64, "validation_examples": 6},
        "model": {"name_or_path": str(folder / "qwen2"), **model},
        "train": {"epochs": 2, "batch_size": 8, "lr": 1e-2, "log_every": 1, "threads": 1},
        "measures": MEASURES,
    }


def classification(folder: Path, **model: Any) -> dict[str, Any]:
    if not (folder / "bert").is_dir():
        bert_folder(folder / "bert")
        write_rte(folder / "data", train=40, dev=12)
    task = {"name": "glue", "task": "rte", "data": str(folder / "data"), "max_length": 32}
    return {
        **generation(folder / "other", **model),
        "task": {**task, "validation_examples": 10},
        "model": {"name_or_path": str(folder / "bert"), **model},
    }


@needed
@pytest.mark.parametrize("how", ["4bit", "8bit"])
@pytest.mark.parametrize("content", [generation, classification])
def test_a_run_on_a_quantised_base(tmp_path: Path, how: str, content: Any, kill_at_replacement: Any) -> None:
    """Trains, is interrupted, goes on to the same end, is saved, loaded and measured."""
    given = content(tmp_path, quantization=how)
    whole = prepared(tmp_path / "whole", "eflat_lora", **given)
    assert finish(whole.path) == "done"
    cut = prepared(tmp_path / "cut", "eflat_lora", **given)
    kill_at_replacement(4)  # environment, state of epoch 1, progress; the state of epoch 2 is lost
    with pytest.raises(Killed):
        finish(cut.path)
    assert finish(cut.path) == "done"
    assert stable(cut) == stable(whole)
    found = whole.measures()
    assert ("is quantized" if how == "4bit" else "is in eight bits") in found["hessian_merged"]["skipped"]
    assert ("values" in found["hessian_adapter"]) is (how == "4bit")
    assert "measure in the space 'adapter'" in found["sam_sharpness_merged"]["skipped"]
    assert found["sam_sharpness_adapter"]["values"]["sharpness"] is not None
    # the products of eight-bit layers are counted as the others
    plain = prepared(tmp_path / "plain", "eflat_lora", **content(tmp_path))
    assert finish(plain.path) == "done"
    counts = [d.measures()["cost"]["values"]["gflops_per_example"] for d in (whole, plain)]
    assert counts[0] == pytest.approx(counts[1])
    assert whole.id != plain.id


@needed
@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_several_processes_train_it_as_one_does(tmp_path: Path, how: str) -> None:
    """Each has the whole base in a few bits, and a share of every batch."""
    given, weights = generation(tmp_path, quantization=how), []
    for processes in (1, 2):
        train = {**given["train"], "processes": processes}
        changes = {**given, "measures": [], "train": train}
        directory = prepared(tmp_path / str(processes), "eflat_lora", **changes)
        start = factors.trainable_parameters(open_run(directory, trained=False).model)
        assert finish(directory.path) == "done"
        weights.append(load_file(model_weights.weights_file(directory.adapter)))
    alone, group = weights
    moved = [float((alone[n.replace(".default", "")] - p.detach()).abs().max()) for n, p in start.items()]
    assert min(moved) > 1e-3
    assert max(float((alone[name] - group[name]).abs().max()) for name in alone) <= 1e-5


@needed
def test_the_head_stays_as_it_is_and_trains(tmp_path: Path) -> None:
    directory = prepared(tmp_path, **classification(tmp_path, quantization="4bit"))
    model = open_run(directory, trained=False).model
    trained = factors.trainable_parameters(model)
    assert any("classifier" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {torch.uint8} < {p.dtype for p in frozen}


@needed
def test_four_bits_have_the_curvature_of_the_weights_they_stand_for(tmp_path: Path) -> None:
    """In the adapter's space, against the same model with its base as floating-point numbers."""
    directory = prepared(tmp_path, **generation(tmp_path, quantization="4bit"))
    import bitsandbytes as bnb

    found = []
    for floating in (False, True):
        run = open_run(directory, trained=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in factors.trainable_parameters(run.model).values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        for module in list(run.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, bnb.nn.Linear4bit) and not hasattr(child, "base_layer"):
                    child.compute_dtype, child.compute_type_is_set = torch.float32, True
                    if floating:
                        setattr(module, name, as_linear(child))
        subject = measuring.subject_of(run, {}, torch.device("cpu"))
        found.append(Hessian(space="adapter", k=2, examples=8)(subject))
    assert found[0]["dimension"] == found[1]["dimension"]
    for i in (1, 2):
        assert found[0][f"eigenvalue_{i}"] == pytest.approx(found[1][f"eigenvalue_{i}"], rel=1e-3)
    assert found[0]["eigenvalue_1"] > 0


def as_linear(quantised: Any) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(quantised.weight.data, quantised.weight.quant_state)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=quantised.bias is not None)
    layer.weight.data = weight.float()
    if quantised.bias is not None:
        layer.bias.data = quantised.bias.data.float()
    return layer.requires_grad_(False)


@needed
def test_eight_bits_have_none(tmp_path: Path) -> None:
    directory = prepared(tmp_path, **generation(tmp_path, quantization="8bit"))
    subject = measuring.subject_of(open_run(directory, trained=False), {}, torch.device("cpu"))
    for products in ("exact", "differences"):
        with pytest.raises(NotApplicableError, match="rounds its inputs"):
            Hessian(space="adapter", products=products)(subject)


@needed
def test_a_model_without_linear_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    model = PretrainedModel(name_or_path=str(tmp_path / "resnet"), quantization="4bit")
    with pytest.raises(InputError, match="no linear layer that could be put into 4bit"):
        pretrained.load(model, AutoModelForImageClassification, pretrained.config(model), 0)


@needed
def test_image_models(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"train": 12, "test": 5})
    content = {
        **generation(tmp_path / "other"),
        "task": {"name": "image_classification", "data": str(tmp_path / "data")},
        "model": {"name_or_path": str(vit_folder(tmp_path / "vit")), "quantization": "4bit"},
        "measures": ["cost"],
    }
    assert finish(prepared(tmp_path, **content).path) == "done"


@needed
def test_noise_on_the_base_weights_is_refused(tmp_path: Path) -> None:
    directory = prepared(tmp_path, "flat_lora_rwp", **generation(tmp_path, quantization="4bit"))
    assert finish(directory.path) == "failed"
    assert "quantised" in json.loads((directory.path / "failure.json").read_text())["error"]


def test_settings_are_qloras() -> None:
    four = quantization.config("4bit", ["classifier"])
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (
        True,
        "nf4",
        True,
    )
    assert four.bnb_4bit_compute_dtype == torch.bfloat16
    assert four.llm_int8_skip_modules == ["classifier"]
    eight = quantization.config("8bit", None)
    assert eight.load_in_8bit
    assert eight.llm_int8_skip_modules is None


def test_a_missing_package_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    loaded = study.Study(
        {"name": "q", "methods": ["lora"], "seeds": [0], **generation(tmp_path, quantization="4bit")},
        "q.yaml",
    )
    with pytest.raises(InputError, match=r"needs the package bitsandbytes.*flatbench-lora\[quantization\]"):
        plan.Plan(loaded, store.StudyFolder(tmp_path, "q"))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("full_ft", r"methods\[0\] \(full_ft\): full fine-tuning moves every weight"),
        ({"name": "lora", "adapter": "pissa"}, "PiSSA starts from the decomposed weights"),
    ],
)
def test_methods_that_need_the_weights(tmp_path: Path, method: Any, said: str) -> None:
    content = {"name": "q", "methods": [method], "seeds": [0], **generation(tmp_path, quantization="4bit")}
    with pytest.raises(InputError, match=said):
        study.Study(content, "q.yaml")


def test_the_default_is_not_hashed() -> None:
    assert "quantization" not in PretrainedModel(name_or_path="x").model_dump()
