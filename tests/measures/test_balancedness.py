"""Balancedness against plain sums, its conservation under gradient flow, and where it does not apply."""

from __future__ import annotations

import pytest
import torch

from flatbench.errors import NotApplicableError
from flatbench.measures.balancedness import Balancedness
from flatbench.models import factors as lora
from tests.measures.measure_cases import subject


def test_against_plain_sums() -> None:
    given = subject("bert_lora")
    found = Balancedness()(given)
    by_layer = [
        sum(x * x for x in f.B.flatten().tolist()) - sum(x * x for x in f.A.flatten().tolist())
        for f in lora.lora_factors(given.model)
    ]
    assert found["balancedness_by_layer"] == pytest.approx(by_layer)
    assert found["balancedness"] == pytest.approx(sum(by_layer) / len(by_layer))
    assert len(found["layers"]) == len(by_layer)
    assert 0 <= found["imbalance"] <= 1


def test_the_gauge_moves_it_and_a_zero_factor_is_wholly_unbalanced() -> None:
    given = subject("bert_lora")
    with torch.no_grad():
        for factor in lora.lora_factors(given.model):
            factor.B.mul_(factor.A.norm() / factor.B.norm())
    assert Balancedness()(given)["balancedness"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        for factor in lora.lora_factors(given.model):
            factor.B.zero_()
    assert Balancedness()(given)["imbalance"] == 1


def test_gradient_flow_conserves_it() -> None:
    """d/dt (‖B‖² − ‖A‖²) = −2⟨B, g_B⟩ + 2⟨A, g_A⟩ = 0, since both are s·⟨G, B·A⟩."""
    given = subject("bert_lora")
    before = Balancedness()(given)["balancedness_by_layer"]
    factors = lora.lora_factors(given.model)
    parameters = [p for f in factors for p in (f.A, f.B)]
    given.model.eval()
    step, moved = 1e-4, 0.0
    for _ in range(20):
        loss, _ = given.loss(given.model, given.batches[0])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=step)
                moved += float(gradient.norm()) * step
    assert moved > 1e-5
    after = Balancedness()(given)["balancedness_by_layer"]
    assert after == pytest.approx(before, abs=20 * moved**2 + 1e-9)


@pytest.mark.parametrize("frozen", ["all", "one layer"])
def test_a_frozen_adapter_is_an_adapter(frozen: str) -> None:
    given = subject("vit_lora")
    before = Balancedness()(given)
    factors = [p for name, p in given.model.named_parameters() if "lora_" in name]
    for parameter in factors if frozen == "all" else factors[:2]:
        parameter.requires_grad_(False)
    assert Balancedness()(given) | {"seconds": 0} == before | {"seconds": 0}


def test_full_fine_tuning_has_none() -> None:
    with pytest.raises(NotApplicableError, match="no adapter"):
        Balancedness()(subject("vit_full"))
