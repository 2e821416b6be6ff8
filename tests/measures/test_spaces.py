"""Spaces hold the right parameters, and the merged model is the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from torch import nn

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators.adapters import adapted_layers
from flatbench.curvature.operators.spaces import plain_name
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.hessian import Hessian
from flatbench.models import factors as lora
from flatbench.subject.spaces import in_space
from tests.measures.measure_cases import CASES, same, snapshot, subject

LORA = [name for name in CASES if not name.endswith("_full")]


@pytest.mark.parametrize("name", LORA)
def test_merged_logits_are_the_unmerged_ones(name: str) -> None:
    given = subject(name)
    given.model.eval()
    with torch.no_grad():
        expected = given.model(**given.batches[0]).logits
        for space in ("merged", "all"):
            with in_space(given, space) as point:
                torch.testing.assert_close(point.model(**given.batches[0]).logits, expected)


@pytest.mark.parametrize("name", LORA)
def test_merged_parameters_are_the_full_weights(name: str) -> None:
    given = subject(name)
    factors = lora.lora_factors(given.model)
    frozen = [factor.layer.get_base_layer().weight.detach().clone() for factor in factors]
    with in_space(given, "merged") as point:
        assert list(point.parameters) == [f"{module}.weight" for module in given.adapted]
        if name != "dora":
            for factor, base, weight in zip(factors, frozen, point.parameters.values(), strict=True):
                delta = factor.scaling * factor.B @ factor.A
                delta = delta.T if name == "gpt2_lora" else delta
                torch.testing.assert_close(weight, base + delta)


def test_adapter_space_is_the_factors_and_not_the_head() -> None:
    given = subject("vit_head")
    wanted = {id(p) for f in lora.lora_factors(given.model) for p in (f.A, f.B)}
    with in_space(given, "adapter") as point:
        assert {id(p) for p in point.parameters.values()} == wanted
        assert point.model is given.model
        assert {id(p) for p in given.model.parameters() if p.requires_grad} == wanted


def test_adapter_of_a_frozen_checkpoint_has_a_space() -> None:
    given = subject("vit_lora")
    given.model.requires_grad_(False)  # as peft loads it for inference
    with in_space(given, "adapter") as point:
        assert len(point.parameters) == 4
    assert not any(p.requires_grad for p in given.model.parameters())


@pytest.mark.parametrize("then", ["inactive", "deleted"])
def test_a_layer_that_only_an_adapter_out_of_use_has_is_not_in_the_merged_space(then: str) -> None:
    given = subject("bert_lora")
    model: Any = given.model
    before = Hessian(space="merged", interval=None)(given)
    with in_space(given, "merged") as point:
        weights = list(point.parameters)
    active = model.active_adapter
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["dense"]))
    model.set_adapter(active)
    if then == "deleted":
        model.delete_adapter("other")
    assert len(adapted_layers(model)) > len(weights)
    names = lora.adapted_modules(model, [])
    again = replace(given, adapted=names)
    with in_space(again, "merged") as point:
        assert list(point.parameters) == weights
    after = Hessian(space="merged", interval=None)(again)
    assert after["dimension"] == before["dimension"]
    assert after["eigenvalue_1"] == pytest.approx(before["eigenvalue_1"], rel=1e-6)
    with HessianOperator(model, given.loss, given.batches, space="merged") as operator:
        assert operator.dimension == before["dimension"]


def test_a_fully_tuned_model_has_the_same_merged_space() -> None:
    given = subject("vit_full")
    with in_space(given, "merged") as full, in_space(subject("vit_lora"), "merged") as adapted:
        assert {n: p.shape for n, p in full.parameters.items()} == {
            n: p.shape for n, p in adapted.parameters.items()
        }
        assert full.model is given.model


@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
def test_inside_only_the_space_has_gradients_and_no_module_trains(space: str) -> None:
    given = subject("vit_head")
    with in_space(given, space) as point:
        assert not any(module.training for module in point.model.modules())
        assert all(p.grad is None for p in point.model.parameters())
        spanning = {n for n, p in point.model.named_parameters() if p.requires_grad}
        spanning = spanning if space == "adapter" else set(map(plain_name, spanning))
        assert spanning == set(point.parameters)
        assert point.dimension == sum(p.numel() for p in point.parameters.values())
        assert point.describe() == {"space": space, "dimension": point.dimension, "precision": "float64"}


@pytest.mark.parametrize("name", ["vit_head", "vit_full"])
def test_everything_is_given_back_after_an_exception(name: str) -> None:
    given = subject(name)
    before = snapshot(given.model)
    for space in ("adapter", "merged", "all") if name == "vit_head" else ("merged", "all"):
        with (
            pytest.raises(ZeroDivisionError),
            in_space(given, space, twice_differentiable=True) as point,
            point.moved([torch.ones_like(p) for p in point.parameters.values()], 0.1),
        ):
            torch.manual_seed(99)
            point.model.train()
            raise ZeroDivisionError
        assert same(before, snapshot(given.model))


def test_buffers_are_put_back() -> None:
    given = subject("mlp_full")
    with in_space(given, "all") as point:
        point.model.normal.running_mean.add_(1)
    assert torch.equal(given.model.normal.running_mean, torch.zeros(5).double())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("vit_lora", "vit_full", "bert_lora") for kind in ("sdpa", "eager")),
        # compiled for the loss outside
        pytest.param("vit_full", "flex_attention", marks=pytest.mark.slow),
        pytest.param("bert_lora", "flex_attention", marks=pytest.mark.long),
    ],
)
def test_attention_is_twice_differentiable_inside_and_put_back(name: str, kind: str) -> None:
    given = subject(name)
    space = "merged" if name == "vit_full" else "adapter"
    inner = given.model.get_base_model() if hasattr(given.model, "get_base_model") else given.model
    inner.config._attn_implementation = kind
    with in_space(given, space, twice_differentiable=True) as point:
        assert inner.config._attn_implementation != "flex_attention"
        loss = given.loss(point.model, given.batches[0])[0]
        parameters = list(point.parameters.values())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.autograd.grad(sum(part.sum() for part in first), parameters)
    assert inner.config._attn_implementation == kind


def test_plain_sdpa_has_no_second_derivative() -> None:
    """The reason for switching; if this fails, the switch may go."""
    given = subject("vit_full")
    with in_space(given, "merged") as point:
        loss = given.loss(point.model, given.batches[0])[0]
        parameters = list(point.parameters.values())
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        with pytest.raises(RuntimeError, match="derivative for"):
            torch.autograd.grad(sum(part.sum() for part in first), parameters)


def test_spaces_that_do_not_exist() -> None:
    with (
        pytest.raises(NotApplicableError, match="merged space is empty"),
        in_space(replace(subject("mlp_full"), adapted=[]), "merged"),
    ):
        pass
    with (
        pytest.raises(InputError, match="adapted module 'nowhere'"),
        in_space(replace(subject("mlp_full"), adapted=["nowhere"]), "merged"),
    ):
        pass


def test_quantized_weights_have_no_space() -> None:
    given = subject("mlp_full")
    given.model.first.weight = nn.Parameter(torch.ones(5, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotApplicableError, match="quantized"), in_space(given, "merged"):
        pass


def test_an_adapter_with_broken_weights_is_an_error() -> None:
    given = subject("vit_lora")
    with torch.no_grad():
        lora.lora_factors(given.model)[0].B.fill_(float("nan"))
    with pytest.raises(FlatbenchError, match="cannot be merged"), in_space(given, "merged"):
        pass
