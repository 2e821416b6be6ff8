"""Tokenised texts are kept by content: nothing is tokenised twice, and nothing else is taken for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertForMaskedLM, GPT2LMHeadModel, PreTrainedTokenizerBase

from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.base import Example, Task
from flatbench.tasks.common import token_cache
from flatbench.tasks.common.token_cache import TokenTable, tokenizer_digest
from flatbench.tasks.generation.causal_lm import CausalLM
from flatbench.tasks.text.glue import Glue
from flatbench.tasks.text.prompt_classification import PromptClassification
from flatbench.tasks.text.text_classification import TextClassification
from tests.tasks.task_cases import (
    WORDS,
    bert_folder,
    decoder_folder,
    gpt2_folder,
    write_gsm8k,
    write_reviews,
    write_rte,
)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for the smallest files as well."""
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MINIMUM", 1)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often any tokenizer was called."""
    calls = [0]
    real = PreTrainedTokenizerBase.__call__

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return real(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", counted)
    return calls


def glue(folder: Path, **options: Any) -> Task:
    model = PretrainedModel(name_or_path=str(folder / "model"))
    return Glue(model=model, task="rte", data=str(folder / "data"), validation_examples=20, **options)


def own(folder: Path, **options: Any) -> Task:
    model = PretrainedModel(name_or_path=str(folder / "model"))
    return TextClassification(model=model, train=str(folder / "reviews.csv"), **options)


def prompts(folder: Path, **options: Any) -> Task:
    model = PretrainedModel(name_or_path=str(folder / "masked"))
    return PromptClassification(model=model, task="rte", data=str(folder / "data"), shots=8, **options)


def generation(folder: Path, model: str = "gpt2", **options: Any) -> Task:
    fixed: dict[str, Any] = {"dataset": "gsm8k", "validation_examples": 10, "generation": None}
    named = PretrainedModel(name_or_path=str(folder / model))
    return CausalLM(model=named, data=str(folder / "gsm8k"), **fixed, **options)


def two_sided(folder: Path, **options: Any) -> Task:
    return generation(folder, "t5", **options)


TASKS = [glue, own, prompts, generation, two_sided]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    bert_folder(folder / "model")
    bert_folder(folder / "masked", BertForMaskedLM, WORDS)
    gpt2_folder(folder / "gpt2", GPT2LMHeadModel)
    decoder_folder(folder / "t5", "t5")
    write_rte(folder / "data")
    write_reviews(folder / "reviews.csv")
    write_gsm8k(folder / "gsm8k")
    return folder


def examples(task: Task) -> list[list[Example]]:
    splits = task.splits(0)
    return [[part[i] for i in range(len(part))] for part in (splits.train, splits.validation, splits.test)]


def names(kept: Path) -> set[str]:
    return {path.name for path in kept.glob("*")}


@pytest.mark.parametrize("make", TASKS)
def test_the_second_load_tokenises_nothing(
    make: Callable[..., Task], files: Path, kept: Path, texts: list[int]
) -> None:
    short = {"max_length": {generation: 36, own: 10}.get(make, 24)}
    first = make(files, **short)
    before = examples(first)
    assert any(first.describe()["truncated"].values())
    assert texts[0] > 0
    assert len(names(kept)) == 3
    texts[0] = 0
    second = make(files, **short)
    assert examples(second) == before
    assert second.describe() == first.describe()
    assert texts[0] == 0
    batch, again = (task.collate([task.splits(0).train[i] for i in (0, 3, 2)]) for task in (first, second))
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)


@pytest.mark.parametrize("make", TASKS)
def test_options_and_content_are_in_the_name(make: Callable[..., Task], files: Path, kept: Path) -> None:
    examples(make(files, max_length=64))
    seen = names(kept)
    examples(make(files, max_length=32))
    assert len(names(kept)) == 2 * len(seen)
    write_rte(files / "data", seed=1)
    write_reviews(files / "reviews.csv", seed=1)
    write_gsm8k(files / "gsm8k", seed=1)
    examples(make(files, max_length=64))
    assert len(names(kept)) == 3 * len(seen)


def test_another_tokenizer_is_another_name(files: Path, kept: Path, texts: list[int]) -> None:
    before = examples(glue(files))
    seen = names(kept)
    shutil.rmtree(files / "model")
    bert_folder(files / "model", words=["zzz"])  # a word more in the vocabulary, and nothing else
    texts[0] = 0
    assert examples(glue(files)) == before
    assert texts[0] > 0
    assert len(names(kept)) == 2 * len(seen)


def test_a_template_is_in_the_name(files: Path, kept: Path) -> None:
    examples(generation(files, max_length=64))
    seen = names(kept)
    examples(generation(files, max_length=64, prompt="Q: {question} A:"))
    assert len(names(kept)) == 2 * len(seen)


def test_the_digest_does_not_depend_on_earlier_calls(files: Path) -> None:
    found = []
    for used in (False, True):
        tokenizer = pretrained.tokenizer(PretrainedModel(name_or_path=str(files / "model")))
        if used:
            tokenizer(["a text"], truncation=True, max_length=4, padding="max_length")
        found.append(tokenizer_digest(tokenizer))
    assert found[0] == found[1] is not None


def test_which_end_is_cut_is_in_the_name(files: Path) -> None:
    found = set()
    for side in ("left", "right"):
        tokenizer = pretrained.tokenizer(PretrainedModel(name_or_path=str(files / "model")))
        tokenizer.truncation_side = side
        found.add(tokenizer_digest(tokenizer))
    assert len(found) == 2


@pytest.mark.parametrize("damage", ["cut", "text", "other columns"])
def test_a_damaged_file_is_made_again(damage: str, files: Path, kept: Path, texts: list[int]) -> None:
    before = examples(glue(files))
    for path in kept.glob("*"):
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:100])
        elif damage == "text":
            path.write_text("nothing")
        else:
            pq.write_table(pa.table({"input_ids": [["a"]]}), path)
    texts[0] = 0
    assert examples(glue(files)) == before
    assert texts[0] > 0
    texts[0] = 0
    assert examples(glue(files)) == before
    assert texts[0] == 0


def test_a_cache_that_cannot_be_written_costs_time_only(files: Path, kept: Path) -> None:
    kept.parent.write_text("a file where the folder should be")
    assert len(examples(glue(files))[0]) == 40


def test_few_rows_are_not_worth_a_file(files: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("FLATBENCH_CACHE", str(kept.parent))
    examples(glue(files))
    assert not names(kept)


def test_a_table_gives_back_its_rows() -> None:
    rows = [{"input_ids": [1, 2, 3], "mask": 2}, {"input_ids": [], "mask": -1}, {"input_ids": [7], "mask": 0}]
    table = TokenTable.of(pa.Table.from_pylist(rows))
    assert list(table) == rows
    assert table[-1] == rows[-1]
    assert [type(value) for value in table[0].values()] == [list, int]
    with pytest.raises(IndexError):
        table[3]
    with pytest.raises(ValueError, match="holds"):
        TokenTable.of(pa.table({"text": ["a"]}))
