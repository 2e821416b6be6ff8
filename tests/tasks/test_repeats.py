"""An example of the training split that is in another one too is told of, in every family."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.store.notes import notes
from flatbench.tasks.base import Task
from flatbench.tasks.generation.causal_lm import CausalLM
from flatbench.tasks.images.image_classification import ImageClassification
from flatbench.tasks.text.text_classification import TextClassification
from flatbench.tasks.vqa.vqa import VQA
from tests.tasks.task_cases import (
    bert_folder,
    decoder_folder,
    vit_folder,
    write_gsm8k,
    write_images,
    write_reviews,
)
from tests.tasks.vqa_cases import qwen_folder, write_scienceqa


def pretrained(folder: Path) -> Any:
    return PretrainedModel(name_or_path=str(folder))


def texts(folder: Path, repeat: int) -> Task:
    train, test = write_reviews(folder / "train.csv"), write_reviews(folder / "test.csv", seed=1)
    options: dict[str, Any] = {"model": pretrained(bert_folder(folder / "bert")), "max_length": 32}
    held = TextClassification(train=str(train), test=str(test), **options).parts["train"]
    with test.open("a", newline="") as file:
        # labelled otherwise, and still what was asked in training
        names = ("good", "bad")
        rows = [
            [text, names[label == names.index("good")]]
            for (text,), label in zip(held.texts, held.labels, strict=True)
        ]
        csv.writer(file).writerows(rows[:repeat])
    return TextClassification(train=str(train), test=str(test), **options)


def generation(folder: Path, repeat: int) -> Task:
    data = write_gsm8k(folder / "gsm8k")
    options: dict[str, Any] = {
        "model": pretrained(decoder_folder(folder / "gpt2", "gpt2")),
        "dataset": "gsm8k",
        "data": str(data),
        "max_length": 64,
        "validation_examples": 10,
        "generation": None,
    }
    questions = [question for (question,) in CausalLM(**options).parts["train"].sources]
    with (data / "test.jsonl").open("a") as file:
        file.writelines(json.dumps({"question": q, "answer": "#### 0"}) + "\n" for q in questions[:repeat])
    return CausalLM(**options)


def test_case_and_blanks_and_validation(tmp_path: Path) -> None:
    """Texts that tokenizers see alike, and test examples on which settings would be chosen."""
    write_reviews(tmp_path / "train.csv")
    write_reviews(tmp_path / "validation.csv", seed=1)
    rows = (tmp_path / "validation.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text(
        "\n".join(
            [rows[0], *(row.upper().replace("BAD", "bad").replace("GOOD", "good") for row in rows[1:8])]
        )
        + "\n"
    )
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation", "test")}
    task = TextClassification(model=pretrained(bert_folder(tmp_path / "bert")), max_length=32, **files)
    assert task.overview()["also_in_validation"] == {"test": 7}
    assert "also_in_train" not in task.overview()


def test_classes_are_named_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels: 'good' is named twice"):
        TextClassification(
            model=pretrained(tmp_path), train="train.csv", labels=["good", "bad", "good"], max_length=32
        )


def images(folder: Path, repeat: int) -> Task:
    data = write_images(folder / "images", {"train": 10, "val": 4, "test": 5})
    for i in range(repeat):  # in another class
        shutil.copy(data / "train" / "a" / f"{i}.png", data / "test" / "b" / f"again{i}.png")
    return ImageClassification(model=pretrained(vit_folder(folder / "vit")), data=str(data))


def questions(folder: Path, repeat: int) -> Task:
    data = write_scienceqa(folder / "scienceqa")
    (file,) = data.rglob("problems.json")
    problems = json.loads(file.read_text())
    by_split = {name: [k for k, p in problems.items() if p["split"] == name] for name in ("train", "test")}
    for source, target in zip(by_split["train"], by_split["test"][:repeat], strict=False):
        problems[target] = {**problems[source], "split": "test"}
        if problems[source]["image"]:
            pictures = file.parent / "images"
            shutil.copytree(pictures / "train" / source, pictures / "test" / target, dirs_exist_ok=True)
    file.write_text(json.dumps(problems))
    model = pretrained(qwen_folder(folder / "qwen"))
    return VQA(model=model, dataset="scienceqa", data=str(data), max_length=256)


@pytest.mark.parametrize("family", [texts, generation, images, questions])
@pytest.mark.parametrize("repeat", [0, 3])
def test_repeated_examples_are_told(tmp_path: Path, family: Callable[[Path, int], Task], repeat: int) -> None:
    described = family(tmp_path, repeat).describe()
    assert described.get("also_in_train", {}).get("test", 0) == repeat
    said = [note for note in notes(described) if "test examples are in train as well" in note]
    assert len(said) == bool(repeat)
