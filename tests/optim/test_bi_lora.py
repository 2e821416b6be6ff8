"""Bi-LoRA against the rule written plainly with explicit matrices."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim import BiLoRA
from tests.optim.models import adapted, problem, snapshot, trainable

STEPS = 10


def optimizers(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(trainable(model), lr=0.5, momentum=0.9)
    return torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1, eps=1e-3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("rho", [0.05, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_as_written_plainly(kind: str, rho: float, dtype: torch.dtype) -> None:
    """The twin holds W0 + B2·A2 as a dense weight, whose gradient gives those of B2 and A2."""
    model = adapted(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer = BiLoRA(optimizers(model, kind), model, rho=rho)
    base = optimizers(twin, kind)
    by_name = {f.name: f for f in lora_factors(twin)}
    weights = [by_name[s.factors.name].layer.get_base_layer().weight for s in optimizer._seconds]
    for weight in weights:
        weight.requires_grad_(True)
    pairs = [(s.A.detach().clone(), s.B.detach().clone()) for s in optimizer._seconds]
    factors = [nn.Parameter(t) for A, B in pairs for t in (A, B)]
    if kind == "sgd":
        ascent: Any = torch.optim.SGD(factors, lr=0.5, momentum=0.9, maximize=True)
    else:
        ascent = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.0, eps=1e-3, maximize=True)
    for step in range(STEPS):
        optimizer.step(problem(model, step))
        clean = [weight.detach().clone() for weight in weights]
        for weight, A, B in zip(weights, factors[::2], factors[1::2], strict=True):
            weight.data.add_(B.detach() @ A.detach())
        problem(twin, step)()
        for weight, A, B in zip(weights, factors[::2], factors[1::2], strict=True):
            A.grad, B.grad = B.detach().T @ weight.grad, weight.grad @ A.detach().T
            weight.grad = None
        for weight, value in zip(weights, clean, strict=True):
            weight.data.copy_(value)
        ascent.step()
        c = math.sqrt(
            sum(
                float((B.detach() @ A.detach()).norm()) ** 2
                for A, B in zip(factors[::2], factors[1::2], strict=True)
            )
        )
        if c > rho:
            for factor in factors:
                factor.data.mul_(math.sqrt(rho / c))
        assert float(optimizer.perturbation_norm) == pytest.approx(min(c, rho), rel=1e-4)
        base.step()
    optimizer.eval()
    own = torch.cat([p.detach().flatten() for p in trainable(model)])
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    expected = torch.cat([p.detach().flatten() for n, p in twin.named_parameters() if n in names])
    bound = 1e-10 if dtype == torch.float64 else 1e-6
    assert (own - expected).norm() <= bound * expected.norm()
    for second, A, B in zip(optimizer._seconds, factors[::2], factors[1::2], strict=True):
        assert (second.A - A).norm() <= 10 * bound * A.norm()
        assert (second.B - B).norm() <= 10 * bound * B.norm()


def test_it_climbs() -> None:
    """The second adapter raises the loss, and the ball bounds by how much."""
    model = adapted()
    optimizer, closure = BiLoRA(optimizers(model, "adamw"), model, rho=1.0), problem(model)
    for _ in range(10):
        optimizer.step(closure)
    optimizer.train()
    there = float(closure().detach())
    optimizer.eval()
    assert there > float(closure().detach())


def test_the_model_never_holds_the_second_adapter() -> None:
    model = adapted()
    before = set(snapshot(model))
    optimizer, closure = BiLoRA(optimizers(model, "adamw"), model), problem(model)
    optimizer.step(closure)
    assert set(snapshot(model)) == before
    assert {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in optimizer._parameters)
    lone = copy.deepcopy(model)
    x = torch.randn(4, 20, dtype=torch.float64)
    optimizer.train()
    assert torch.equal(lone(x), model.eval()(x)), "a copy of the model, and evaluation, go without it"


def test_gradients_do_not_pile_up_when_only_the_model_is_cleared() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    one, other = (BiLoRA(optimizers(m, "adamw"), m, rho=1.0) for m in (model, twin))
    closure, twin_closure = problem(model), problem(twin)
    for _ in range(4):
        one.step(closure)
        twin_closure()  # a backward pass that nothing uses
        other.step(twin_closure)
    assert all(torch.equal(a, b) for a, b in zip(trainable(model), trainable(twin), strict=True))


def test_options() -> None:
    model = adapted()
    optimizer = BiLoRA(optimizers(model, "sgd"), model, r=2, ascent_lr=0.3)
    assert {s.A.shape[0] for s in optimizer._seconds} == {2}
    optimizer.step(problem(model))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.3]
    with pytest.raises(ValueError, match="r must be"):
        BiLoRA(optimizers(model, "sgd"), model, r=0)
    plain = nn.Linear(3, 3)
    with pytest.raises(InputError, match="no LoRA layer"):
        BiLoRA(torch.optim.SGD(plain.parameters(), lr=0.1), plain)


def test_a_base_without_maximize_climbs_too() -> None:
    class Plain(torch.optim.Optimizer):
        """Gradient descent, and nothing that a group could ask for."""

        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(group["lr"] * p.grad)

    model = adapted()
    twin = copy.deepcopy(model)
    odd = BiLoRA(Plain(trainable(model), lr=0.5), model, rho=1.0)
    sgd = BiLoRA(torch.optim.SGD(trainable(twin), lr=0.5), twin, rho=1.0)
    for _ in range(5):
        odd.step(problem(model))
        sgd.step(problem(twin))
    for one, other in zip(odd._parameters, sgd._parameters, strict=True):
        torch.testing.assert_close(one, other)
