"""``adapter.target: qv``: GPT-2's query and value adapted apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXModel

from flatbench.config.sections import AdapterOptions
from flatbench.errors import InputError
from flatbench.models.adapt import adapt
from flatbench.models.factors import lora_factors
from flatbench.models.projections import split_projections

IDS = torch.tensor([[1, 5, 3, 2], [4, 4, 0, 6]])


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 11, "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16}
    drop = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **drop))
    for p in model.parameters():  # biases too, which start as zeros
        nn.init.normal_(p, std=0.3)
    return model.double().eval()


def test_split_projections_compute_what_the_fused_one_does() -> None:
    fused, split = gpt2(), gpt2()
    assert split_projections(split) == 2
    torch.testing.assert_close(split(IDS).logits, fused(IDS).logits, rtol=1e-12, atol=1e-12)
    assert split_projections(split) == 0  # again, nothing is left to split
    # also in generation, whose cache the same attention fills
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(split.generate(IDS, **options), fused.generate(IDS, **options))


def test_query_and_value_have_factors_of_their_own() -> None:
    """Against the change of the fused weight worked out by hand; key does not change."""
    options = AdapterOptions(r=2, alpha=6, target="qv")
    model = adapt(gpt2(), options, ["c_attn"], [])
    factors = lora_factors(model)
    assert [f.name.rpartition("h.")[2] for f in factors] == [
        f"{i}.attn.c_attn.{name}" for i in (0, 1) for name in ("q_proj", "v_proj")
    ]
    assert {(tuple(f.A.shape), tuple(f.B.shape)) for f in factors} == {((2, 8), (8, 2))}
    expected = gpt2()
    with torch.no_grad():
        for f in factors:
            f.B.copy_(torch.randn(f.B.shape))
            layer, part = int(f.name.rpartition("h.")[2][0]), {"q_proj": 0, "v_proj": 2}[f.name[-6:]]
            change = 3.0 * (f.B @ f.A).T
            expected.transformer.h[layer].attn.c_attn.weight[:, 8 * part : 8 * part + 8] += change
    torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-6, atol=1e-6)


def test_peft_alone_has_one_factor_for_query_key_and_value() -> None:
    """What the option is for."""
    [first, _] = lora_factors(adapt(gpt2(), AdapterOptions(r=2), ["c_attn"], []))
    assert first.A.shape == (2, 8)
    assert first.B.shape == (24, 2)


def test_models_with_separate_projections_keep_them() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    bert = adapt(BertModel(BertConfig(vocab_size=11, **shape)), AdapterOptions(target="qv"), [], [])
    names = {n.rpartition(".")[2] for n, m in bert.named_modules() if isinstance(m, LoraLayer)}
    assert names == {"query", "value"}


def test_fused_projections_in_another_order_are_refused() -> None:
    """GPT-NeoX lays the three of each head side by side: thirds of its weight would be something else."""
    shape = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    model = GPTNeoXModel(GPTNeoXConfig(vocab_size=11, **shape))
    with pytest.raises(InputError, match=r"adapter\.target: qv.*adapter\.target_modules"):
        adapt(model, AdapterOptions(target="qv"), [], [])


@pytest.mark.parametrize("more", [{"name": "none"}, {"target_modules": ["c_attn"]}])
def test_target_says_what_lora_adapts_and_nothing_else_does(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="target says what LoRA adapts"):
        AdapterOptions(target="qv", **more)
    assert "target" not in AdapterOptions().model_dump(mode="json")


@pytest.mark.slow
def test_a_run_is_the_same_when_it_is_opened_again(tmp_path: Path) -> None:
    from flatbench.runs import open as opening
    from flatbench.runs.finish import finish
    from flatbench.store import StudyFolder
    from flatbench.study import Study
    from flatbench.study.plan import Plan
    from tests.tasks.task_cases import gpt2_folder
    from tests.tasks.test_causal_lm import write_e2e

    content = {
        "name": "split",
        "task": {
            "name": "causal_lm",
            "dataset": "e2e",
            "data": str(write_e2e(tmp_path / "data")),
            "prompt": "{linearised}||",
            "max_length": 128,
            "generation": None,
            "label_smoothing": 0.1,
        },
        "model": {"name_or_path": str(gpt2_folder(tmp_path / "gpt2", GPT2LMHeadModel, n_positions=128))},
        "adapter": {"r": 2, "target": "qv", "dropout": 0.1},
        "methods": ["eflat_lora"],
        "seeds": [0],
        "train": {"epochs": 1, "threads": 1, "lr": 1e-2, "batch_size": 4},
        "measures": [{"name": "hessian", "examples": 4, "max_iterations": 3}, "balancedness"],
    }
    folder = StudyFolder(tmp_path / "results", "split")
    [run] = Plan(Study(content, "study.yaml"), folder).final([])
    directory = folder.run(run.id)
    directory.prepare(run.spec())
    assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
    again = opening.open_run(directory, trained=True)
    batch = again.task.collate([again.splits.train[i] for i in range(len(again.splits.train))])
    result = directory.result()
    assert result is not None
    with torch.no_grad():
        loss = float(again.task.loss(again.model.eval(), batch))
    assert loss == pytest.approx(result["metrics"]["train"]["loss"], rel=1e-5)
    layers = directory.measures()["balancedness"]["values"]["layers"]
    assert [name.rpartition(".")[2] for name in layers] == ["q_proj", "v_proj"]
