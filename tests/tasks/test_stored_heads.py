"""A model's stored head is taken where it names the task's classes in their order, and told of where not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.store import notes
from flatbench.tasks.images.image_classification import ImageClassification
from flatbench.tasks.text.glue import Glue
from flatbench.tasks.text.text_classification import TextClassification
from tests.tasks.task_cases import bert_folder, write_images, write_reviews, write_rte

CLASSES = {"text": ["bad", "good"], "glue": ["entailment", "not_entailment"], "image": ["a", "b", "c"]}


def task_of(kind: str, folder: Path, names: Sequence[str]) -> Any:
    """The task on a model whose head names these classes."""
    config: Any = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model = PretrainedModel(name_or_path=str(folder / "model"))
    if kind != "image":
        bert_folder(folder / "model", BertForSequenceClassification, **config)
        if kind == "glue":
            return Glue(model=model, task="rte", data=str(write_rte(folder)), validation_examples=20)
        return TextClassification(model=model, train=str(write_reviews(folder / "reviews.csv")))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **shape, **config))
    vit.save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    data = write_images(folder / "data", {"train": 12, "test": 5})
    return ImageClassification(model=model, data=str(data))


def stored(kind: str, folder: Path) -> nn.Module:
    cls = ViTForImageClassification if kind == "image" else BertForSequenceClassification
    head: nn.Module = cls.from_pretrained(folder / "model").classifier
    return head


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("how", ["same", "in capitals", "nameless"])
def test_a_head_of_these_classes_is_taken(kind: str, how: str, tmp_path: Path) -> None:
    names = CLASSES[kind]
    if how != "same":
        names = [n.upper() if how == "in capitals" else f"LABEL_{i}" for i, n in enumerate(names)]
    task = task_of(kind, tmp_path, names)
    assert torch.equal(task.build_model(1).classifier.weight, stored(kind, tmp_path).weight)
    assert not notes.notes(task.overview())


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("how", ["in another order", "others"])
def test_a_head_of_other_classes_is_drawn_anew_and_told(kind: str, how: str, tmp_path: Path) -> None:
    names = CLASSES[kind][::-1] if how == "in another order" else [f"{n} x" for n in CLASSES[kind]]
    task = task_of(kind, tmp_path, names)
    head = task.build_model(1).classifier
    assert not torch.isclose(head.weight, stored(kind, tmp_path).weight).any()
    assert not head.bias.any()
    assert 0.01 < float(head.weight.std()) < 0.04
    assert torch.equal(head.weight, task.build_model(1).classifier.weight)
    assert not torch.equal(head.weight, task.build_model(2).classifier.weight)
    (note,) = notes.notes(task.overview())
    assert ", ".join(names) in note
    assert "random weights" in note


def test_a_norm_in_a_head_that_is_drawn_anew_passes_on_what_it_gets(tmp_path: Path) -> None:
    """ModernBERT's head holds one; with weights of zero nothing would reach the classifier."""
    config = ModernBertConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        id2label={0: "good", 1: "bad"},
    )  # fmt: skip
    ModernBertForSequenceClassification(config).save_pretrained(tmp_path)
    model, _ = pretrained.load_classifier(
        PretrainedModel(name_or_path=str(tmp_path)),
        AutoModelForSequenceClassification,
        ModernBertConfig.from_pretrained(tmp_path),
        ["bad", "good"],
        0,
    )
    norm: Any = model.get_submodule("head.norm")
    assert bool((norm.weight == 1).all())
    with torch.no_grad():
        one, other = model.eval()(torch.tensor([[1, 5, 2], [1, 9, 2]])).logits
    assert not torch.equal(one, other)
