"""Perturbations in the merged weights against dense algebra on a model without adapters."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flatbench.errors import NotApplicableError
from flatbench.measures.interference import Interference
from flatbench.models import factors as lora
from flatbench.optim import EFlatLoRA
from flatbench.report.analysis.interference import PERTURBATIONS
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import same, snapshot, subject
from tests.measures.test_ema_gap import loss_of

RHO = 0.2
NAMES = ("full", "sam", "sam_A", "sam_B", "sam_cross", "sam_linear", "flat_lora")


def dense(given: Subject) -> tuple[Any, list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
    """The merged model, its adapted weights and their gradient, and the perturbations as (n, m) matrices."""
    model = given.model.eval()
    factors = lora.lora_factors(model)
    gradients = torch.autograd.grad(loss_of(given), [p for f in factors for p in (f.A, f.B)])
    length = sum(float(g.square().sum()) for g in gradients) ** 0.5
    E_A = [RHO * g / length for g in gradients[::2]]
    E_B = [RHO * g / length for g in gradients[1::2]]
    A, B, s = [f.A.detach() for f in factors], [f.B.detach() for f in factors], [f.scaling for f in factors]
    found = {
        "sam_A": [s * b @ e for s, b, e in zip(s, B, E_A, strict=True)],
        "sam_B": [s * e @ a for s, e, a in zip(s, E_B, A, strict=True)],
        "sam_cross": [s * e @ d for s, e, d in zip(s, E_B, E_A, strict=True)],
        "sam": [s * ((b + e) @ (a + d) - b @ a) for s, b, e, a, d in zip(s, B, E_B, A, E_A, strict=True)],
    }
    found["sam_linear"] = [x + y for x, y in zip(found["sam_A"], found["sam_B"], strict=True)]
    plain = copy.deepcopy(model).merge_and_unload()
    names = [f.name.removeprefix("base_model.model.") for f in factors]
    weights = [plain.get_submodule(name).weight.requires_grad_() for name in names]
    merged = replace(given, model=plain)
    G = list(torch.autograd.grad(loss_of(merged), weights))
    transposed = [tuple(g.shape) != (len(b), a.shape[1]) for g, a, b in zip(G, A, B, strict=True)]
    G = [g.T if t else g for g, t in zip(G, transposed, strict=True)]
    size = sum(float(g.square().sum()) for g in G) ** 0.5
    found["full"] = [RHO * g / size for g in G]
    # arXiv 2508.00522, Eq. 10 to Eq. 14, with pseudo-inverses
    pinv = torch.linalg.pinv
    both = [
        (g_B @ pinv(a.T) + pinv(b.T) @ g_A) / (2 * s)
        for g_A, g_B, a, b, s in zip(gradients[::2], gradients[1::2], A, B, s, strict=True)
    ]
    size = sum(float(g.square().sum()) for g in both) ** 0.5
    found["flat_lora"] = [RHO * g / size @ pinv(a) @ a for g, a in zip(both, A, strict=True)]
    return merged, weights, G, found


# a language model's loss is taken in float32
@pytest.mark.parametrize(("model", "near"), [("mlp_lora", 1e-6), ("bert_lora", 1e-6), ("gpt2_lora", 1e-4)])
def test_against_dense_matrices(model: str, near: float) -> None:
    given = subject(model)
    merged, weights, G, moves = dense(copy.deepcopy(given))
    before = snapshot(given.model)
    found = Interference(rho=RHO, examples=10**6)(given)
    assert same(before, snapshot(given.model))
    trained, slope = float(loss_of(merged).detach()), sum(float(g.square().sum()) for g in G) ** 0.5
    assert found["loss"] == pytest.approx(trained, rel=near)
    assert found["gradient_norm"] == pytest.approx(slope, rel=near)
    told = {key.removesuffix("_norm") for key in found if key.endswith("_norm")} - {"gradient"}
    assert told <= set(PERTURBATIONS)  # a report has words for each
    for name in NAMES:
        parts = moves[name]
        size = sum(float(part.square().sum()) for part in parts) ** 0.5
        inner = sum(float((g * part).sum()) for g, part in zip(G, parts, strict=True))
        assert found[f"{name}_norm"] == pytest.approx(size, rel=near), name
        assert found[f"{name}_share"] == pytest.approx(size / RHO, rel=near), name
        assert found[f"{name}_cosine"] == pytest.approx(inner / size / slope, rel=near, abs=near), name
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, part in zip(weights, parts, strict=True):
                weight.add_(part if weight.shape == part.shape else part.T, alpha=RHO / size)
            rise = float(loss_of(merged).detach()) - trained
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)
        assert found[f"{name}_rise"] == pytest.approx(rise, rel=near, abs=near), name
    assert found["full_cosine"] == pytest.approx(1)
    assert "eflat_lora_norm" not in found  # nothing trains it


def test_at_the_start_one_term_is_all_there_is() -> None:
    """B = 0: A has no gradient, and Flat-LoRA's perturbation has the norm rho."""
    given = subject("bert_lora")
    with torch.no_grad():
        for factor in lora.lora_factors(given.model):
            factor.B.zero_()
    found = Interference(rho=RHO)(given)
    for name in ("sam_A", "sam_cross"):
        assert found[f"{name}_norm"] == 0
        assert found[f"{name}_cosine"] is found[f"{name}_rise"] is None
    assert found["sam_norm"] == found["sam_B_norm"] == found["sam_linear_norm"] > 0
    assert found["flat_lora_share"] == pytest.approx(1, rel=1e-6)
    assert found["flat_lora_cosine"] >= found["sam_B_cosine"]  # G·P_A against G·AᵀA


def test_eflat_loras_own_average() -> None:
    """With beta = 1 and no learning, its average is what Flat-LoRA makes of the same loss."""
    given = subject("mlp_lora")
    trainable = [p for p in given.model.parameters() if p.requires_grad]
    optimizer = EFlatLoRA(torch.optim.SGD(trainable, lr=0.0), given.model, rho=RHO, beta=1.0)
    given.model.eval()
    optimizer.zero_grad()
    loss_of(given).backward()
    optimizer.step()
    optimizer.eval()
    found = Interference(rho=RHO)(replace(given, optimizer=optimizer))
    for what in ("norm", "cosine", "rise"):
        assert found[f"eflat_lora_{what}"] == pytest.approx(found[f"flat_lora_{what}"], rel=1e-6)


@pytest.mark.parametrize("model", ["dora", "vit_full"])
def test_models_without_such_a_product_are_refused(model: str) -> None:
    with pytest.raises(NotApplicableError, match=r"DoRA|no adapter"):
        Interference()(subject(model))
