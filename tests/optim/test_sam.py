"""SAM against the closed form, a plain implementation, and what it does to a merged weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flatbench.models.factors import lora_factors
from flatbench.optim import SAM
from flatbench.optim.base import Radius
from tests.optim.models import adapted, problem, trainable


def test_closed_form_on_a_quadratic() -> None:
    """L = ½·wᵀHw: the second gradient is H·(w + rho·Hw/‖Hw‖)."""
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    H = root @ root.T
    w = nn.Parameter(torch.randn(6, dtype=torch.float64))
    start = w.detach().clone()

    def closure() -> torch.Tensor:
        w.grad = None
        loss = 0.5 * w @ H @ w
        loss.backward()
        return loss

    optimizer = SAM(torch.optim.SGD([w], lr=0.1), nn.ParameterList([w]), rho=0.4)
    loss = optimizer.step(closure)
    g = H @ start
    torch.testing.assert_close(w.detach(), start - 0.1 * H @ (start + 0.4 * g / g.norm()))
    assert loss.item() == pytest.approx(float(0.5 * start @ H @ start))
    assert float(optimizer.perturbation_norm) == pytest.approx(0.4)


def plain_sam_step(model: nn.Module, base: torch.optim.Optimizer, closure, rho: float) -> None:
    """The two steps as davda54/sam writes them, parameter by parameter."""
    closure()
    parameters = [p for p in trainable(model) if p.grad is not None]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    old = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data.add_(p.grad * rho / norm)
    closure()
    for p, value in zip(parameters, old, strict=True):
        p.data.copy_(value)
    base.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_as_written_plainly(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    twin = copy.deepcopy(model)
    base = torch.optim.SGD(trainable(twin), lr=0.1, momentum=0.9)
    optimizer = SAM(torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9), model, rho=0.1)
    for _ in range(10):
        optimizer.step(problem(model))
        plain_sam_step(twin, base, problem(twin), 0.1)
    for own, expected in zip(trainable(model), trainable(twin), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-7)


def test_lora_sam_moves_the_merged_weight_by_cross_terms() -> None:
    """ΔW = s·(B·E_A + E_B·A + E_B·E_A): not a multiple of the gradient, which the paper objects to."""
    model = adapted()
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    for _ in range(5):
        problem(model)()
        optimizer.step()
    problem(model)()
    rho, factors = 0.1, lora_factors(model)
    norm = torch.stack([p.grad.norm() for p in trainable(model) if p.grad is not None]).norm()
    merged, expected = [], []
    for f in factors:
        A, B = f.A.detach().clone(), f.B.detach().clone()
        E_A, E_B = rho * f.A.grad / norm, rho * f.B.grad / norm
        merged.append(f.scaling * ((B + E_B) @ (A + E_A) - B @ A))
        expected.append(f.scaling * (B @ E_A + E_B @ A + E_B @ E_A))
    sam = SAM(torch.optim.SGD(trainable(model), lr=0.0), model, rho=rho)
    before = [f.B.detach() @ f.A.detach() for f in factors]
    with torch.no_grad():
        sam.perturb()
    for f, old, change, terms in zip(factors, before, merged, expected, strict=True):
        torch.testing.assert_close(f.scaling * ((f.B @ f.A).detach() - old), change)
        torch.testing.assert_close(change, terms)
        G = f.B.grad @ torch.linalg.pinv(f.A.detach().T)  # what Flat-LoRA would move along
        assert torch.cosine_similarity(change.flatten(), G.flatten(), dim=0) < 0.99


def test_the_parts_are_asked_for_in_order() -> None:
    model = adapted()
    optimizer = SAM(torch.optim.SGD(trainable(model), lr=0.1), model)
    with pytest.raises(ValueError, match="without perturb"):
        optimizer.restore()
    problem(model)()
    assert optimizer.perturb()
    with pytest.raises(ValueError, match="called twice"):
        optimizer.perturb()
    with pytest.raises(ValueError, match="two gradients a step"):
        optimizer.step()
    problem(model)()
    optimizer.restore()
    optimizer.step()
    with pytest.raises(ValueError, match="two gradients a step"):
        optimizer.step()
    with pytest.raises(ValueError, match="every"):
        SAM(torch.optim.SGD(trainable(model), lr=0.1), model, every=0)


def test_schedules() -> None:
    assert [Radius(0.4, "constant", None).at(t) for t in (0, 9)] == [0.4, 0.4]
    assert [Radius(0.4, "linear", 10).at(t) for t in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])
    assert [Radius(0.4, "cosine", 10).at(t) for t in (0, 5, 10)] == pytest.approx([0.4, 0.2, 0.0])
    assert [Radius(0.4, "inv_sqrt", None).at(t) for t in (0, 3)] == pytest.approx([0.4, 0.2])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((-0.1, "constant", None), "rho"),
        ((float("nan"), "constant", None), "rho"),
        ((0.1, "linear", None), "total_steps"),
        ((0.1, "step", 3), "unknown rho_schedule"),
    ],
)
def test_bad_radius(arguments, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Radius(*arguments)
