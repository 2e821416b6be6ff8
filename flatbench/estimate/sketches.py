"""A condition's sizes and shapes from the table of sources: no data, weights or tokenizers are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from flatbench.config import sources
from flatbench.config.study_files import UNSET
from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.tasks.base import Task
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.generation.causal_lm import CausalLM
from flatbench.tasks.images.clip_classification import ClipClassification
from flatbench.tasks.text import prompt_data
from flatbench.tasks.text.glue import Glue
from flatbench.tasks.text.prompt_classification import PromptClassification
from flatbench.tasks.vqa import data as vqa_data
from flatbench.tasks.vqa.vqa import VQA

Batch = Mapping[str, Tensor]

#: tokens of a prompt's own words, of marks around a text, and of an instruction with its chat's marks
_PROMPT, _MARKS, _CHAT = 5, 3, 45
#: references a meaning of E2E's development and test files, and how many meanings these have
_REFERENCES, _MEANINGS = 8.0, 630
#: text after which a generated one ends, on average
#: prompts of classes, and tokens of each, with which a model of images is counted
PROMPTS = (8, 10)
_ANSWER = {"e2e": 25, "gsm8k": 100, "scienceqa": 2, "vizwiz": 3}


@dataclass(frozen=True)
class Sketch:
    """What is known of a condition before its data are there.

    Attributes:
        task: told its configuration, so that it can make its model's shapes and take a loss.
        sizes: split -> examples.
        lengths: tokens of an example: mean and 95th percentile; None where all are of one size.
        longest: tokens that an example can have.
        batch: (examples, tokens) -> a batch of that shape.
        generated: (texts, new tokens of each, beams) that a final run generates.
        prompts: how many prompts of classes every batch has beside, and their tokens.
    """

    task: Task
    sizes: dict[str, int]
    lengths: tuple[float, float] | None
    longest: int
    batch: Callable[[int, int], Batch]
    generated: tuple[int, int, int] = (0, 0, 0)
    prompts: tuple[int, int] = (0, 0)


def sketch(task: Task) -> Sketch:
    """The sketch of a task. Raises InputError where the table of sources knows too little."""
    family = next((kind for kind in _FAMILIES if isinstance(task, kind)), None)
    known = None if family is None else _source_of(task)
    if family is None or known is None:
        raise InputError("its data are in no table of sources, so that their number is not known before")
    configure(task)
    return _FAMILIES[family](task, known)


def unset(task: Any) -> bool:
    """Whether the task's data are a variable of the study that has no value yet."""
    options = getattr(task, "source_options", (None, None))
    named = getattr(task, "data", None) or next((o for o in options if isinstance(o, str) and UNSET in o), "")
    return UNSET in str(named)


def _source_of(task: Any) -> sources.Data | None:
    """The table's entry for a task's data, or for those that it usually has."""
    if not unset(task):
        found: sources.Data | None = task.source().known
        return found
    if isinstance(task, Glue):
        return sources.data(sources.GLUE, task.task)
    if isinstance(task, PromptClassification):
        return sources.data(*prompt_data.DATA[task.task].hub)
    if isinstance(task, CausalLM):
        return sources.data(*generation_data.SOURCES[task.dataset].hub)
    if isinstance(task, VQA):
        usual = sources.data(vqa_data.HUB.get(task.dataset, ""))
        return usual or sources.FILES.get(task.dataset)
    return sources.FILES.get(getattr(task, "dataset", None) or "")


def configure(task: Any) -> None:
    """Give the task its model's configuration: of a folder, of the table, or else of the hub."""
    entry = sources.model(task.model.name_or_path)
    if task.model.folder is None and entry is not None:
        content = dict(entry.configuration)
        task.__dict__["_config"] = AutoConfig.for_model(content.pop("model_type"), **content)
    else:
        task.__dict__["_config"] = pretrained.config(task.model)


def _held_out(wanted: int | None, rows: int, most: int) -> int:
    return wanted or max(1, min(rows // 10, most))


def _text(task: Any, masked: bool = False) -> Callable[[int, int], Batch]:
    def batch(examples: int, tokens: int) -> Batch:
        ids = torch.full((examples, tokens), 5)
        if task._config.eos_token_id is not None:
            ids[:, -1] = task._config.eos_token_id  # at which T5 reads off a class
        made = {
            "input_ids": ids,
            "attention_mask": torch.ones(examples, tokens, dtype=torch.int64),
            "labels": torch.zeros(examples, dtype=torch.int64 if task.labels else torch.float32),
        }
        return {**made, "mask_positions": torch.ones(examples, dtype=torch.int64)} if masked else made

    return batch


def _glue(task: Glue, known: sources.Data) -> Sketch:
    rows = {split: count for split, count in known.splits.items() if not split.startswith("test")}
    train, tests = rows.pop("train"), rows
    validation = _held_out(task.sizes["validation"], train, 1000)
    most = task.sizes["test"]
    sizes = {"train": task.sizes["train"] or train - validation, "validation": validation}
    sizes |= {f"test {split}": min(count, most or count) for split, count in tests.items()}
    return Sketch(task, sizes, _plus(known.tokens, _MARKS), task.max_length, _text(task))


def _prompts(task: PromptClassification, known: sources.Data) -> Sketch:
    classes = len(task.labels)
    counts = known.counts or [known.splits["train"] // classes] * classes
    rows = known.splits[prompt_data.DATA[task.task].test]
    sizes = {
        "train": sum(min(count, task.shots) for count in counts),
        "validation": sum(min(max(count - task.shots, 0), task.shots) for count in counts),
        "test": min(rows, task.test_examples or rows),
    }
    task.__dict__["word_ids"] = list(range(classes))
    return Sketch(
        task, sizes, _plus(known.tokens, _PROMPT + _MARKS), task.max_length, _text(task, masked=True)
    )


def _generation(task: CausalLM, known: sources.Data) -> Sketch:
    rows, sizes = known.splits, task.sizes
    references = _REFERENCES if "validation" in rows else 1.0
    if "validation" in rows:
        validation = min(rows["validation"], round((sizes["validation"] or 10**9) * references))
        train = rows["train"]
    else:
        validation = _held_out(sizes["validation"], rows["train"], 500)
        train = rows["train"] - validation
    asked = min(sizes["test"] or 10**9, _MEANINGS if "validation" in rows else rows["test"])
    found = {
        "train": min(train, sizes["train"] or train),
        "validation": validation,
        "test": min(rows["test"], round(asked * references)) if sizes["test"] else rows["test"],
    }

    def batch(examples: int, tokens: int) -> Batch:
        ids = torch.full((examples, tokens), 5)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    beams = task.generation.beams if task.generation else 0
    new = min(_ANSWER[task.dataset], task.generation.max_new_tokens) if task.generation else 0
    made = (asked if task.generation else 0, new, beams)
    return Sketch(task, found, _plus(known.tokens, _MARKS + 8), task.max_length, batch, made)


def _clip(task: ClipClassification, known: sources.Data) -> Sketch:
    text, vision = task._config.text_config, task._config.vision_config
    classes, length = len(known.labels), round(sum(known.tokens) / 2) + _MARKS
    ids = torch.full(PROMPTS, 5)
    ids[:, -1] = text.eos_token_id
    task.__dict__["_tokens"] = ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 0)
    tests = known.splits["test"]
    sizes = {
        "train": min(classes * task.shots, known.splits["train"]),
        "validation": min(classes * task.validation_shots, known.splits["validation"]),
        "test": min(tests, task.test_examples or tests),
    }

    def batch(examples: int, tokens: int) -> Batch:
        pixels = torch.zeros(examples, vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": pixels, "labels": torch.zeros(examples, dtype=torch.int64)}

    return Sketch(task, sizes, None, 0, batch, prompts=(classes, length))


class _AsItIs:
    """A batch that is what the model takes already."""

    def inputs(self, batch: Batch) -> Batch:
        return batch


def _vqa(task: VQA, known: sources.Data) -> Sketch:
    rows = dict(known.splits)
    if "test" not in rows:  # VizWiz
        rows["test"], rows["validation"] = rows["validation"], _held_out(None, rows["train"], 500)
        rows["train"] -= rows["validation"]
    if task.questions != "all" and task.source_options[0] == "scienceqa":
        pictured = {"train": 6218, "validation": 2097, "test": 2017}
        rows = pictured if task.questions == "with_image" else {k: rows[k] - pictured[k] for k in pictured}
    sizes = {split: min(rows[split], task.sizes[split] or rows[split]) for split in rows}
    config = task._config
    if config.model_type != "qwen2_5_vl":
        raise InputError(f"a model of type '{config.model_type}' is not to be sketched without its processor")
    vision = config.vision_config
    side = 2 * round((task.image_size or 448) / (2 * vision.patch_size))
    places = side * side // vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    task.__dict__["_collator"] = _AsItIs()

    def batch(examples: int, tokens: int) -> Batch:
        ids = torch.full((examples, places + 2 + tokens), 5)
        ids[:, 0], ids[:, 1 : places + 1] = config.vision_start_token_id, config.image_token_id
        ids[:, places + 1] = config.vision_end_token_id
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids,
            "mm_token_type_ids": (ids == config.image_token_id).long(),
            "pixel_values": torch.zeros(examples * side * side, patch),
            "image_grid_thw": torch.tensor([[1, side, side]] * examples),
        }

    longest = max(task.max_length - places, 1)
    made = (sizes["test"], min(_ANSWER[task.dataset], task.max_new_tokens), 1)
    return Sketch(task, sizes, _plus(known.tokens, _CHAT), longest, batch, made)


def _plus(tokens: tuple[float, float], more: int) -> tuple[float, float]:
    return tokens[0] + more, tokens[1] + more


_FAMILIES: dict[type[Task], Callable[[Any, sources.Data], Sketch]] = {
    Glue: _glue,
    PromptClassification: _prompts,
    CausalLM: _generation,
    ClipClassification: _clip,
    VQA: _vqa,
}


def padded_lengths(
    lengths: tuple[float, float], longest: int, batch_size: int, grouped: bool
) -> Sequence[float]:
    """Lengths that batches are padded to, of lengths that are spread as a lognormal.

    Args:
        lengths: mean and 95th percentile.
        grouped: whether batches hold texts of alike length.

    Returns:
        Nine lengths that are equally likely.
    """
    mean, high = lengths
    # the spread s with exp(1.645·s − s²/2) = high / mean
    wanted = math.log(max(high / mean, 1.0001))
    spread = 1.645 - math.sqrt(max(1.645**2 - 2 * wanted, 0.0))
    centre = math.log(mean) - spread**2 / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    found = []
    for i in range(9):
        quantile = torch.tensor((i + 0.5) / 9, dtype=torch.float64)
        if not grouped:  # the largest of a batch
            quantile = quantile ** (1 / batch_size)
        found.append(min(math.exp(centre + spread * float(normal.icdf(quantile))), longest))
    return found


def shortages(task: Task) -> dict[str, dict[str, int]]:
    """Split -> class -> examples, of the classes that the table of sources knows to be short of shots."""
    if not isinstance(task, PromptClassification):
        return {}
    known = _source_of(task)
    counts = dict(zip(task.labels, known.counts, strict=True)) if known and known.counts else {}
    parts = {"train": counts, "validation": {name: max(n - task.shots, 0) for name, n in counts.items()}}
    return {part: {name: n for name, n in own.items() if n < task.shots} for part, own in parts.items()}
