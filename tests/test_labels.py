"""Labels and terms: every place that counts says one number, and it is what the loss is a mean of."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

import flatbench
from flatbench.curvature import GaussNewtonOperator, HessianOperator
from flatbench.curvature.operators.gauss_newton import cross_entropy
from flatbench.curvature.operators.losses import transformers_loss
from flatbench.labels import IGNORED, aligned, count_terms, counted, shifts, unwrapped
from flatbench.landscape.evaluation.packing import Packing, packed
from flatbench.models.pretrained import PretrainedModel
from flatbench.notebook.data import splits_of
from flatbench.notebook.losses import loss_of
from flatbench.tasks.common import token_loss
from flatbench.tasks.generation.causal_lm import CausalLM
from tests.tasks.task_cases import decoder_folder

WORDS = 23
BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
#: three rows, the second padded on the right, with prompts without labels; 10 labels, 8 with one before them
ROWS = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, 0, 0], [9, 1, 4, 2, 6]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
LABELS = torch.tensor([[5, 6, 7, 8, 9], [4, 3, 2, -100, -100], [-100, -100, -100, 2, 6]])
BATCH = {"input_ids": ROWS, "attention_mask": MASK, "labels": LABELS}


class MyCausalLMWrapper(GPT2LMHeadModel):
    """A name of which `endswith` and `in` say different things."""


class Renamed(GPT2LMHeadModel):
    """A name that says nothing, and a forward pass that leaves everything to its parent's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class MaskedCausalLM(BertForMaskedLM):
    """A name that says the wrong thing."""


class Around(nn.Module):
    """As data parallelism wraps a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Tensor) -> Any:
        return self.module(**batch)


def gpt2(kind: Any = GPT2LMHeadModel, **config: Any) -> nn.Module:
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
    return kind(GPT2Config(vocab_size=WORDS, **shape, **config))


def t5() -> nn.Module:
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, decoder_start_token_id=0, **shape))


def bert(kind: Any = BertForMaskedLM, **config: Any) -> nn.Module:
    return kind(BertConfig(vocab_size=WORDS, max_position_embeddings=16, **BERT, **config))


def bart_decoder() -> nn.Module:
    shape = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "forced_eos_token_id": 0}
    config = BartConfig(vocab_size=WORDS, max_position_embeddings=16, **shape, **ends)
    return transformers.BartForCausalLM(config)


def lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_attn"]))


#: model -> (how it is made, whether it shifts)
MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "gpt2": (gpt2, True),
    "subclass": (lambda: gpt2(MyCausalLMWrapper), True),
    "own forward": (lambda: gpt2(Renamed), True),
    "lora": (lambda: lora(gpt2()), True),
    "lora of subclass": (lambda: lora(gpt2(MyCausalLMWrapper)), True),
    "wrapped": (lambda: Around(lora(gpt2())), True),
    "t5": (t5, False),
    "bert": (bert, False),
    "bert subclass": (lambda: bert(MaskedCausalLM), False),
    "bert decoder": (lambda: bert(BertLMHeadModel, is_decoder=True), True),
    # called causal and told to shift by its loss type; it compares labels where they stand all the same
    "bart decoder": (bart_decoder, False),
}
everyone = pytest.mark.parametrize("name", MODELS)


@functools.cache
def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name][0]().double().eval()


@everyone
def test_the_mean_loss_times_the_terms_is_the_sum_over_the_shifted_labels(name: str) -> None:
    model, shifted = made(name), MODELS[name][1]
    assert shifts(model) == shifted
    with torch.no_grad():
        loss, terms = transformers_loss(model, BATCH)
        logits = model(**BATCH).logits
    assert terms == (8 if shifted else 10)
    total = 0.0
    for row, labels in zip(logits.log_softmax(-1).tolist(), LABELS.tolist(), strict=True):
        for place, label in enumerate(labels):
            if label != -100 and not (shifted and place == 0):
                total -= row[place - 1 if shifted else place][label]
    assert float(loss) * terms == pytest.approx(total, rel=1e-6)  # GPT-2 computes its loss in float32


@everyone
def test_every_place_that_counts_gives_the_same_number(name: str) -> None:
    model, shifted = made(name), MODELS[name][1]
    expected = count_terms(LABELS, shifted)
    seen: dict[str, int] = {}
    with torch.no_grad():
        logits = model(**BATCH).logits
        seen["curvature"] = transformers_loss(model, BATCH)[1]
        seen["notebook"] = loss_of(model, None)(model, BATCH)[1]
        seen["gauss-newton"] = cross_entropy(logits, BATCH, shifted)[1]
        seen["by hand"] = int(counted(aligned(LABELS, shifted)).sum())
        parts = packed([BATCH], Packing(tokens=5, overhead=0.0))
        seen["packed"] = sum(loss_of(model, None)(model, part)[1] for part in parts)
        evaluated = token_loss.evaluate(model, [BATCH], lambda m, b: (m(**b).loss, m(**b).logits), shifted)
        loss = float(transformers_loss(model, BATCH)[0])
    assert seen == dict.fromkeys(seen, expected)
    assert evaluated["loss"] == pytest.approx(loss)
    assert len(parts) > 1


@pytest.mark.parametrize("name", ["gpt2", "subclass", "bert", "bart decoder"])
def test_the_gauss_newton_matrix_is_of_the_models_own_loss(name: str) -> None:
    model = made(name)
    with HessianOperator(model, batches=[BATCH]) as hessian:
        expected = hessian.point()
    with GaussNewtonOperator(model, batches=[BATCH]) as operator:
        value, gradient = operator.point()
    assert value == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_the_task_counts_as_its_model_does(tmp_path: Path, architecture: str) -> None:
    folder = decoder_folder(tmp_path / "model", architecture)
    task = CausalLM(model=PretrainedModel(name_or_path=str(folder)), dataset="e2e", data=str(tmp_path))
    model = task.build_model(0)
    assert task.terms(BATCH) == transformers_loss(model, BATCH)[1] == (8 if architecture == "gpt2" else 10)


def test_classifiers_of_causal_models_have_a_term_an_example() -> None:
    model = gpt2(GPT2ForSequenceClassification, num_labels=2, pad_token_id=0)
    batch = {**BATCH, "labels": torch.tensor([0, 1, IGNORED])}
    assert not shifts(model)
    assert transformers_loss(model, batch)[1] == loss_of(model, None)(model, batch)[1] == 2


@pytest.mark.parametrize(("shape", "terms"), [((4,), 4), ((4, 3), 4)])
def test_each_example_with_scores_is_a_term(shape: tuple[int, ...], terms: int) -> None:
    assert count_terms(torch.zeros(shape), shifted=False) == count_terms(torch.zeros(shape), True) == terms


def test_texts_get_labels_by_what_the_model_does_and_not_by_its_name() -> None:
    rows = [{"input_ids": r, "attention_mask": m} for r, m in zip(ROWS.tolist(), MASK.tolist(), strict=True)]
    for name in ("gpt2", "subclass", "lora"):
        (batch,) = splits_of(rows, lambda: None, made(name), torch.device("cpu"))["train"]
        assert torch.equal(batch["labels"], ROWS.masked_fill(MASK == 0, IGNORED))


@pytest.mark.slow
def test_unwrapping_ends_at_the_model_itself() -> None:
    model = gpt2()
    assert unwrapped(torch.compile(Around(lora(model)))) is model  # type: ignore[arg-type]
    assert not shifts(nn.Linear(2, 2))


@pytest.mark.slow
def test_nobody_else_says_which_label_is_no_term() -> None:
    package = Path(flatbench.__file__).parent
    saying = [
        path.name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100"
    ]
    assert saying == ["labels.py"]
