"""Generated texts are what the study says: not what a model's folder adds, nor beyond its positions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import GenerationConfig

from flatbench.errors import InputError
from flatbench.landscape.evaluation.collect import Collected
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.common import generating
from flatbench.tasks.generation.causal_lm import CausalLM, Generation
from flatbench.training.trainer import fixed_batches
from tests.tasks.task_cases import CASES, decoder_folder, write_gsm8k

PENALTIES = {"repetition_penalty": 3.0, "min_new_tokens": 5, "num_beams": 4, "suppress_tokens": [3, 4, 5]}


def causal_lm(folder: Path, architecture: str, **options: Any) -> CausalLM:
    return CausalLM(
        model=PretrainedModel(name_or_path=str(decoder_folder(folder / architecture, architecture))),
        dataset="gsm8k",
        data=str(write_gsm8k(folder / "data")),
        max_length=64,
        validation_examples=10,
        **options,
    )


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "t5"])
@pytest.mark.parametrize("adapted", [False, True])
def test_what_a_folder_asks_of_generation_changes_no_text(
    architecture: str, adapted: bool, tmp_path: Path
) -> None:
    task = causal_lm(tmp_path, architecture, generation=Generation(max_new_tokens=8))
    model = task.build_model(0)
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=list(task.target_modules)))
    prompts = [prompt for prompt, _ in task.splits(0).test.prompts]
    plain = task.generate(model, prompts, 6)
    inner = model.get_base_model() if adapted else model
    for name, value in PENALTIES.items():
        setattr(inner.generation_config, name, value)
    own = inner.generation_config
    assert task.generate(model, prompts, 6) == plain
    assert inner.generation_config is own
    assert own.repetition_penalty == 3.0
    assert "generation_config" not in vars(model) or not adapted


def test_tokens_are_the_models_own() -> None:
    module = torch.nn.Linear(1, 1)
    module.generation_config = GenerationConfig(eos_token_id=[1, 2], decoder_start_token_id=7, top_k=3)
    with generating.as_told(module):
        found = module.generation_config
        assert (found.eos_token_id, found.decoder_start_token_id) == ([1, 2], 7)
        assert found.top_k != 3
    assert module.generation_config.top_k == 3


def test_texts_end_where_the_positions_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = causal_lm(tmp_path, "gpt2", generation=Generation(max_new_tokens=1000))
    model: Any = task.build_model(0)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    prompts = [prompt for prompt, _ in task.splits(0).test.prompts][:3]
    caplog.set_level(logging.WARNING)
    assert len(task.generate(model, prompts, 2)) == 3
    longest, limit = max(map(len, prompts)), model.config.max_position_embeddings
    assert f"texts end after {limit - longest} tokens, not 1000" in caplog.text
    with pytest.raises(InputError, match="fills the model's"):
        generating.room_for(1, limit, model.config)


@pytest.mark.parametrize("name", ["gpt2", "t5", "vqa"])
def test_token_accuracy_of_a_landscape_is_that_of_the_run(name: str, tmp_path: Path) -> None:
    """From the model's own logits and labels, of batches of any lengths."""
    task: Any = CASES["vqa"](tmp_path).task() if name == "vqa" else causal_lm(tmp_path, name)
    model = task.build_model(0).eval()
    batches = list(fixed_batches(task, task.splits(0).train, 3, torch.device("cpu")))
    assert len({batch["labels"].shape[1] for batch in batches}) > 1
    expected = task.evaluate(model, batches)
    found = Collected([task.metrics])
    for batch in batches:
        with torch.no_grad():
            loss, logits = task.outputs(model, batch)
        found.add("validation", batch, loss, task.terms(batch), logits)
    values = found.values()["validation"]
    assert values["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert values["token_accuracy"] == pytest.approx(expected["token_accuracy"], rel=1e-9)
