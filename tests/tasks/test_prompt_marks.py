"""Prompts that an answer follows end without the mark that some tokenizers put behind every text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.common import tokenising
from flatbench.tasks.generation.causal_lm import CausalLM
from flatbench.tasks.vqa.vqa import VQA
from tests.tasks.task_cases import bert_folder, decoder_folder, write_gsm8k
from tests.tasks.vqa_cases import make, qwen_folder, write_scienceqa

MARK = "<|endoftext|>"


def put_marks(folder: Path, before: bool, mark: str, number: int) -> Path:
    """Have a folder's tokenizer end every text with a mark, and begin it so too with ``before``."""
    content = json.loads((folder / "tokenizer.json").read_text())
    special = {"SpecialToken": {"id": mark, "type_id": 0}}
    template = [*([special] if before else []), {"Sequence": {"id": "A", "type_id": 0}}, special]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, {"Sequence": {"id": "B", "type_id": 0}}, special],
        "special_tokens": {mark: {"id": mark, "ids": [number], "tokens": [mark]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def language_task(folder: Path, data: Path) -> CausalLM:
    model = PretrainedModel(name_or_path=str(folder))
    return CausalLM(model=model, dataset="gsm8k", data=str(data), max_length=64, validation_examples=10)


@pytest.mark.parametrize("before", [False, True])
def test_a_decoders_prompts_go_on(tmp_path: Path, before: bool) -> None:
    data = write_gsm8k(tmp_path)
    plain = language_task(decoder_folder(tmp_path / "plain", "qwen2"), data)
    marked = language_task(put_marks(decoder_folder(tmp_path / "marked", "qwen2"), before, MARK, 256), data)
    ours, theirs = plain.splits(0).train[0], marked.splits(0).train[0]
    begin = [256] if before else []
    assert marked._sequences["train"].prompts[0][0] == [*begin, *plain._sequences["train"].prompts[0][0]]
    assert theirs["input_ids"] == [*begin, *ours["input_ids"]]
    assert theirs["labels"] == [*[-100] * len(begin), *ours["labels"]]


def test_an_encoder_decoders_prompts_keep_their_end(tmp_path: Path) -> None:
    data = write_gsm8k(tmp_path)
    task = language_task(put_marks(decoder_folder(tmp_path / "t5", "t5"), False, MARK, 256), data)
    assert task.splits(0).train[0]["input_ids"][-1] == 256


def test_questions_about_pictures_go_on(tmp_path: Path) -> None:
    data, (plain, marked) = write_scienceqa(tmp_path), (qwen_folder(tmp_path / n) for n in ("a", "b"))
    tokenizer = AutoTokenizer.from_pretrained(marked)
    put_marks(marked, False, tokenizer.eos_token, tokenizer.eos_token_id)
    tasks: list[VQA] = [make(plain, data), make(marked, data)]
    ours, theirs = (task.splits(0).train[0] for task in tasks)
    for name in ("input_ids", "labels"):
        assert list(theirs[name]) == list(ours[name])


def test_runs_that_nothing_changed_for_keep_their_names(tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(decoder_folder(tmp_path / "plain", "gpt2"))
    marked = AutoTokenizer.from_pretrained(
        put_marks(decoder_folder(tmp_path / "marked", "gpt2"), True, MARK, 256)
    )
    bert = AutoTokenizer.from_pretrained(bert_folder(tmp_path / "bert"))  # [CLS] text [SEP]
    assert [tokenising.marks_behind(t) for t in (plain, marked, bert)] == [0, 1, 1]
    assert tokenising.name_of_prompts(plain, goes_on=True) == b""
    assert tokenising.name_of_prompts(marked, goes_on=False) == b""
    assert tokenising.name_of_prompts(marked, goes_on=True)
