"""The Gauss-Newton operator against dense Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatbench.curvature import GaussNewtonOperator, HessianOperator, top_eigenpairs
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
        jacobians = torch.autograd.functional.jacobian(of(batch), flat)
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
