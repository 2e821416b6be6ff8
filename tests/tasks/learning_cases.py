"""Problems that are easy by construction, one for each family of tasks, and small models that learn them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import BertForMaskedLM, GPT2LMHeadModel

from tests.tasks.task_cases import (
    WORDS,
    bert_folder,
    clip_folder,
    decoder_folder,
    gpt2_folder,
    vit_folder,
    write_images,
    write_tsv,
)
from tests.tasks.vqa_cases import qwen_folder, write_scienceqa

METHODS = ("full_ft", "lora", "flat_lora", "eflat_lora")
#: those that are tried with every family in a short time: the others differ by no code of a family, and that
#: a family's model is saved whole is tested by `test_contract`
FEW = ("lora", "eflat_lora")
LETTERS = {"hidden_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Problem:
    """Sections of a study on which the main metric can reach its maximum.

    Attributes:
        task, model, adapter, train: as in a study file.
        rho: radius of the methods that have one.
        learners: methods that get every test example right; the loss falls with all. An adapter on random
            frozen weights does not write texts, so that there it is full fine-tuning alone.
        full_lr: learning rate of full fine-tuning.
        falls: epochs in which the loss falls with a method that is no learner; None for all of them.
        few: methods that are tried in a short time.
    """

    task: dict[str, Any]
    model: Path
    train: dict[str, Any]
    adapter: dict[str, Any]
    rho: float = 0.05
    learners: tuple[str, ...] = METHODS
    full_lr: float = 5e-3
    falls: int | None = None
    few: tuple[str, ...] = FEW


def letters(folder: Path) -> Path:
    """SST-2's files, in which the first letter says the class."""
    for name, count in (("train", 80), ("dev", 20)):
        rows = [[f"{'pq'[i % 2]} {i}", i % 2] for i in range(count)]
        write_tsv(folder / f"{name}.tsv", [["sentence", "label"], *rows])
    return folder


def prompts(folder: Path) -> Problem:
    return Problem(
        task={"name": "prompt_classification", "task": "sst2", "data": str(letters(folder / "data")),
              "shots": 20, "max_length": 32},
        model=bert_folder(folder / "bert", BertForMaskedLM, WORDS, **LETTERS),
        adapter={"r": 8, "alpha": 32, "target_modules": ["query", "key", "value", "dense"]},
        train={"epochs": 16, "batch_size": 8, "lr": 1e-2},
    )  # fmt: skip


def glue(folder: Path) -> Problem:
    return Problem(
        task={"name": "glue", "task": "sst2", "data": str(letters(folder / "data")), "max_length": 32},
        model=bert_folder(folder / "bert", **LETTERS),
        adapter={"r": 4, "alpha": 16},
        train={"epochs": 10, "batch_size": 8, "lr": 1e-2},
    )


def texts(folder: Path) -> Problem:
    frame = pd.DataFrame({"text": [f"{'pq'[i % 2]}, {i}" for i in range(100)], "label": ["good", "bad"] * 50})
    frame.to_csv(folder / "reviews.csv", index=False)
    return Problem(
        task={"name": "text_classification", "train": str(folder / "reviews.csv"), "max_length": 32},
        model=bert_folder(folder / "bert", **LETTERS),
        adapter={"r": 4, "alpha": 16},
        train={"epochs": 10, "batch_size": 8, "lr": 1e-2},
    )


def images(folder: Path) -> Problem:
    """Brighter from class to class."""
    return Problem(
        task={"name": "image_classification",
              "data": str(write_images(folder / "data", {"train": 20, "test": 5}))},
        model=vit_folder(folder / "vit"),
        adapter={"r": 4, "alpha": 16},
        train={"epochs": 15, "batch_size": 8, "lr": 1e-2},
    )  # fmt: skip


def clip(folder: Path) -> Problem:
    """Brighter from class to class, with a prompt each."""
    return Problem(
        task={"name": "clip_classification", "shots": 8,
              "data": str(write_images(folder / "data", {"train": 20, "test": 5}))},
        model=clip_folder(folder / "clip"),
        adapter={"r": 4, "alpha": 16},
        train={"epochs": 25, "batch_size": 6, "lr": 1e-2},
        rho=0.01,
        full_lr=3e-3,
    )  # fmt: skip


def copies(
    folder: Path, model: Path, layers: list[str], few: tuple[str, ...] = ("full_ft", *FEW), **train: Any
) -> Problem:
    """Questions that hold their answer's number."""
    data = folder / "data"
    data.mkdir()
    for name, count in (("train", 60), ("test", 10)):
        rows = [
            {"question": f"{'abcdef'[i // 10]}{i % 10}", "answer": f"#### {i % 10}"} for i in range(count)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Problem(
        task={"name": "causal_lm", "dataset": "gsm8k", "data": str(data), "prompt": "{question}:",
              "max_length": 24, "validation_examples": 2, "generation": {"beams": 2, "max_new_tokens": 8}},
        model=model,
        adapter={"r": 8, "alpha": 32, "target_modules": layers},
        train={"epochs": 40, "batch_size": 10, "lr": 1e-2, **train},
        learners=("full_ft",),
        falls=6,
        few=few,
    )  # fmt: skip


def gpt2(folder: Path) -> Problem:
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = gpt2_folder(folder / "gpt2", GPT2LMHeadModel, n_embd=64, **plain)
    return copies(folder, model, ["c_attn"])


def qwen2(folder: Path) -> Problem:
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = decoder_folder(folder / "qwen2", "qwen2", **size)
    # it learns this last, so that in a short time its loss falls
    return copies(folder, model, ["q_proj", "v_proj"], FEW, epochs=120)


def t5(folder: Path) -> Problem:
    size = {"d_model": 64, "d_ff": 64, "dropout_rate": 0.0}
    return copies(folder, decoder_folder(folder / "t5", "t5", **size), ["q", "v"])


def pictures(folder: Path) -> Problem:
    """The colour of the picture is the answer, and the words say nothing."""
    data = write_scienceqa(folder / "data", counts=(24, 6, 12))
    return Problem(
        task={"name": "vqa", "dataset": "scienceqa", "data": str(data), "instruction": "", "max_length": 256,
              "max_new_tokens": 3, "image_size": 28, "questions": "with_image"},
        model=qwen_folder(folder / "qwen", hidden_size=32),
        adapter={"r": 8, "alpha": 32},
        train={"epochs": 80, "batch_size": 24, "lr": 2e-2},
        learners=("full_ft",),
        falls=20,
        few=("full_ft", *FEW),
    )  # fmt: skip


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "prompt_classification": prompts,
    "glue": glue,
    "text_classification": texts,
    "image_classification": images,
    "clip_classification": clip,
    "causal_lm-gpt2": gpt2,
    "causal_lm-qwen2": qwen2,
    "causal_lm-t5": t5,
    "vqa": pictures,
}
