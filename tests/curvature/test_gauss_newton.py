"""The Gauss-Newton operator against dense Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from flatbench.curvature import GaussNewtonOperator, HessianOperator, top_eigenpairs
from flatbench.errors import NotApplicableError
from tests.curvature.curvature_cases import CASES, lora, on_mapping, vit


def dense(model: nn.Module, batches: list[Any]) -> Tensor:
    """``Σ_i J_iᵀ (diag p_i − p_i p_iᵀ) J_i / N`` over the examples i."""
    names = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in names.values()])

    def of(batch: Any) -> Any:
        def outputs(flat: Tensor) -> Tensor:
            parts = flat.split([p.numel() for p in names.values()])
            named = {n: part.view(p.shape) for (n, p), part in zip(names.items(), parts, strict=True)}
            return torch.func.functional_call(model, named, (batch[0],))

        return outputs

    total, count = torch.zeros(len(flat), len(flat), dtype=torch.float64), 0
    for batch in batches:
        jacobians = torch.autograd.functional.jacobian(of(batch), flat, vectorize=True)
        for J, p in zip(jacobians, of(batch)(flat).softmax(dim=1), strict=True):
            total += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
            count += 1
    return total / count


def operator(name: str, **options: Any) -> GaussNewtonOperator:
    case = CASES[name]
    model, batches = case.make()
    return GaussNewtonOperator(
        model,
        lambda model, batch: model(batch[0]),
        lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
        batches,
        **options,
    )


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_products_are_those_of_the_dense_matrix(name: str) -> None:
    model, batches = CASES[name].make()
    matrix = dense(model.eval(), batches)
    vectors = torch.randn(len(matrix), 2, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(operator(name) @ vectors, matrix @ vectors, rtol=1e-10, atol=1e-12)
    with operator(name) as generous:
        room = generous.plan.peak_bytes
    with operator(name, memory=room // 2 * 3 // 2 + 32 * len(matrix)) as cramped:
        assert cramped.plan.graph != "kept"
        torch.testing.assert_close(cramped @ vectors, matrix @ vectors, rtol=1e-10, atol=1e-12)
    assert min(top_eigenpairs(operator(name), 3, which="SA").values) > -1e-10


def test_transformers_models_need_no_functions() -> None:
    case = CASES["vit lora, merged"]
    model, batches = case.make()
    made = GaussNewtonOperator(model, batches=batches, space="merged")
    hessian = HessianOperator(model, on_mapping, batches, space="merged")
    assert made.point()[0] == pytest.approx(hessian.point()[0])
    torch.testing.assert_close(made.point()[1], hessian.point()[1])
    assert set(made.blocks()) == {name.removesuffix(".weight") for name in made.shapes}


def test_at_a_perfect_fit_of_a_linear_model_it_is_the_hessian() -> None:
    """Linear outputs have no second derivative: Gauss-Newton and Hessian are one."""
    model = nn.Linear(4, 3).double()
    batches = [(torch.randn(5, 4).double(), torch.randint(0, 3, (5,)))]
    made = GaussNewtonOperator(
        model, lambda m, b: m(b[0]), lambda o, b: nn.functional.cross_entropy(o, b[1]), batches
    )
    hessian = HessianOperator(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batches)
    identity = torch.eye(15).double()
    torch.testing.assert_close(made @ identity, hessian @ identity)


def test_it_sees_no_second_derivative_of_the_model() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        model = lora(vit(), ["q_proj"]).double()
    batches = CASES["vit"].batches((3,))
    made = GaussNewtonOperator(model, batches=batches, space="adapter")
    # at B = 0 the logits are linear in B alone: A has no part in the Gauss-Newton matrix
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with made:
        blocks = made @ torch.eye(made.dimension, dtype=torch.float64)
    sizes = {name: shape.numel() for name, shape in made.shapes.items()}
    start = 0
    for name, size in sizes.items():
        part = blocks[start : start + size, start : start + size]
        assert bool(part.any()) == ("lora_B" in name)
        start += size


def by_tokens(model: nn.Module, batches: list[Any], inputs: Any, ahead: int) -> Tensor:
    """``Σ J_tᵀ (diag p_t − p_t p_tᵀ) J_t / N`` over the tokens t with a label, ``ahead`` places on."""
    names = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in names.values()])
    total, count = torch.zeros(len(flat), len(flat), dtype=torch.float64), 0

    for batch in batches:

        def outputs(flat: Tensor, batch: Any = batch) -> Tensor:
            parts = flat.split([p.numel() for p in names.values()])
            named = {n: part.view(p.shape) for (n, p), part in zip(names.items(), parts, strict=True)}
            logits: Tensor = torch.func.functional_call(model, named, (), inputs(batch)).logits
            places = logits[:, :-1] if ahead else logits
            return places[batch["labels"][:, ahead:] != -100]

        with sdpa_kernel(SDPBackend.MATH):
            jacobians = torch.autograd.functional.jacobian(outputs, flat, vectorize=True)
        for J, p in zip(jacobians, outputs(flat).softmax(dim=1), strict=True):
            total += J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
            count += 1
    return total / count


def of(*keys: str) -> Any:
    return lambda batch: {key: batch[key] for key in keys}


@pytest.mark.parametrize("kind", ["causal", "masked", "tokens", "encoder-decoder"])
def test_the_default_compares_each_logit_with_the_label_that_the_model_does(kind: str) -> None:
    """A causal model's with the next token; a masked model's and a tagger's with their own."""
    torch.manual_seed(0)
    small = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    words = {"vocab_size": 5, "max_position_embeddings": 6}
    built: dict[str, Any] = {
        "causal": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=2, n_positions=6)
        ),
        "masked": lambda: BertForMaskedLM(BertConfig(**small, **words)),
        "tokens": lambda: BertForTokenClassification(BertConfig(**small, **words, num_labels=5)),
        "encoder-decoder": lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=5, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=4, decoder_ffn_dim=4, max_position_embeddings=6,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            )
        ),
    }  # fmt: skip
    model = built[kind]().double().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    batches = []
    for rows in (2, 1):
        ids = torch.randint(0, 5, (rows, 5))
        labels = torch.where(torch.rand(rows, 5) < 0.3, -100, torch.randint(0, 5, (rows, 5)))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    keys = ("input_ids", "attention_mask", *(("labels",) if kind == "encoder-decoder" else ()))
    matrix = by_tokens(model, batches, of(*keys), ahead=int(kind == "causal"))
    made = GaussNewtonOperator(model, batches=batches)
    vector = torch.randn(len(matrix), generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(made @ vector, matrix @ vector, rtol=1e-9, atol=1e-11)
    hessian = HessianOperator(model, batches=batches)  # transformers' own loss, taken in float32
    assert made.point()[0] == pytest.approx(hessian.point()[0], rel=1e-6)


def test_a_loss_that_is_not_the_cross_entropy_is_refused() -> None:
    """A regression has no classes; a model that smooths its labels has another criterion."""
    model, batches = CASES["vit"].make()
    GaussNewtonOperator(model, batches=batches).point()
    inner: Any = model
    inner.loss_function = lambda labels, logits, *rest, **more: nn.functional.cross_entropy(
        logits, labels, label_smoothing=0.3
    )
    with pytest.raises(NotApplicableError, match=r"own loss is [\d.]+ on .* logits [\d.]+: give outputs="):
        GaussNewtonOperator(model, batches=batches).point()
