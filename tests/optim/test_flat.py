"""Flat-LoRA and EFlat-LoRA against the rules written plainly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim import EFlatLoRA, FlatLoRA
from tests.optim.models import adapted, layers, problem, trainable
from tests.optim.reference import Layer, Reference, full_gradient

CLASSES = {"flat_lora": FlatLoRA, "eflat_lora": EFlatLoRA}
STEPS = 12


def pair(method: str, model: nn.Module, **options: Any) -> tuple[Any, nn.Module, Reference]:
    """Our optimizer on ``model``, and the reference on a copy."""

    def base(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    twin = copy.deepcopy(model)
    ours = CLASSES[method](base(trainable(model)), model, rho=0.3, **options)
    by_name = {f.name: Layer(f.A, f.B, f.scaling) for f in lora_factors(twin)}
    reference = Reference(
        [by_name[f.name] for f in ours.full_space.factors],
        base(trainable(twin)),
        rho=0.3,
        beta=options.get("beta", 0.1) if method == "eflat_lora" else None,
        estimate=options.get("grad_estimate", "average"),
        norm=options.get("norm", "global"),
    )
    return ours, twin, reference


def relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("rslora", [False, True])
def test_float64_trajectory(method: str, r: int, rslora: bool) -> None:
    """A whole run from B = 0, ours and the reference each on its own way, to 1e-10."""
    model = adapted(r, rslora=rslora)
    assert not any(f.B.any() for f in lora_factors(model))
    ours, twin, reference = pair(method, model)
    closure, twin_closure = problem(model), problem(twin)
    for _ in range(STEPS):
        ours.step(closure)
        reference.step(twin_closure)
        for own, expected in zip(trainable(model), trainable(twin), strict=True):
            assert relative(own, expected) <= 1e-10
    ours.eval()
    reference.finish()
    for own, expected in zip(trainable(model), trainable(twin), strict=True):
        assert relative(own, expected) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("r", [1, 4, 16])
def test_perturbation_at_every_point_of_a_run(r: int, seed: int, dtype: torch.dtype) -> None:
    """E_B along a run with AdamW, from B = 0, against explicit pseudo-inverses at the same points.

    After Adam's first step every entry of B is ±lr, and B is nearly rank-deficient (condition numbers up to
    1e9 here). Then a pseudo-inverse itself is known to eps times the condition number only, which is what
    the float64 bound grows with; everywhere else it is 1e-10.
    """
    model = adapted(r, dtype, seed)
    base, closure = torch.optim.AdamW(trainable(model), lr=1e-2), problem(model, seed)
    optimizer = make(model, rho=0.3)
    for _ in range(STEPS):
        closure()
        ours, _ = optimizer.full_space.perturbation(0.3, "average", "global")
        factors = optimizer.full_space.factors
        reference = Reference([Layer(f.A, f.B, f.scaling) for f in factors], base, rho=0.3)
        conditions = [float(torch.linalg.cond(f.B.detach().double())) for f in factors if f.B.any()]
        bound = 1e-5 if dtype == torch.float32 else max(1e-10, 1e-15 * max(conditions, default=1))
        for own, expected in zip(ours, reference.perturbations(), strict=True):
            assert relative(own, expected) <= bound
        base.step()


@pytest.mark.parametrize("norm", ["global", "layer"])
@pytest.mark.parametrize("estimate", ["average", "B", "tangent"])
@pytest.mark.parametrize("method", CLASSES)
def test_every_estimate_and_norm(method: str, estimate: str, norm: str) -> None:
    model = adapted(4)
    ours, twin, reference = pair(method, model, grad_estimate=estimate, norm=norm)
    closure, twin_closure = problem(model), problem(twin)
    for _ in range(STEPS):
        ours.step(closure)
        reference.step(twin_closure)
    for own, expected in zip(trainable(model), trainable(twin), strict=True):
        assert relative(own, expected) <= 1e-10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("r", [1, 4, 16])
@pytest.mark.parametrize("method", CLASSES)
def test_float32_step_by_step(method: str, r: int, seed: int) -> None:
    """From the same float32 point each step: perturbation and weights agree to 1e-5."""
    model = adapted(r, torch.float32, seed)
    ours, twin, reference = pair(method, model)
    closure, twin_closure = problem(model, seed), problem(twin, seed)
    for _ in range(STEPS):
        ours.step(closure)
        reference.step(twin_closure)
        for own, expected in zip(trainable(model), trainable(twin), strict=True):
            assert relative(own, expected) <= 1e-5
            expected.data.copy_(own.data)
        if method == "eflat_lora":
            # the reference goes on from our state, so that each step is compared, not the drift of many
            for own_average, expected in zip(ours._average, reference.average, strict=True):
                assert relative(own_average, expected) <= 1e-5
            reference.average = [value.double() for value in ours._average]
            reference.clean = [value.clone() for value in ours.layout.unflatten(ours._base_point)]
        reference.base.load_state_dict(copy.deepcopy(ours.base.state_dict()))


@pytest.mark.parametrize("norm", ["global", "layer"])
@pytest.mark.parametrize("estimate", ["average", "B", "tangent"])
@pytest.mark.parametrize("method", CLASSES)
def test_ten_steps_in_float32(method: str, estimate: str, norm: str) -> None:
    """A run of its own from where B has its rank, against the reference on a run of its own."""
    model = trained(dtype=torch.float32)
    ours, twin, reference = pair(method, model, grad_estimate=estimate, norm=norm)
    for seed in range(10):
        ours.step(problem(model, seed))
        reference.step(problem(twin, seed))
    ours.eval()
    reference.finish()
    own = torch.cat([p.detach().flatten() for p in trainable(model)])
    expected = torch.cat([p.detach().flatten() for p in trainable(twin)])
    assert relative(own, expected) <= 1e-6


def gradients(model: nn.Module) -> list[Layer]:
    problem(model)()
    return layers(model)


def trained(r: int = 4, steps: int = 5, **options: Any) -> nn.Module:
    """A model whose B is not zero any more."""
    model = adapted(r, **options)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    closure = problem(model)
    for _ in range(steps):
        closure()
        optimizer.step()
    return model


def test_the_two_gradients_share_their_core() -> None:
    """g_A·Aᵀ = Bᵀ·g_B for any loss (methods.md, §7)."""
    for layer in gradients(trained()):
        torch.testing.assert_close(layer.A.grad @ layer.A.T, layer.B.T @ layer.B.grad, rtol=1e-9, atol=1e-14)


def test_the_estimates_are_projections_of_the_true_gradient() -> None:
    model = trained()
    base_weights = [m.base_layer.weight for m in model.modules() if hasattr(m, "base_layer")]
    for weight in base_weights:
        weight.requires_grad_(True)
    for layer, weight in zip(gradients(model), base_weights, strict=True):
        A, B, G = layer.A.detach(), layer.B.detach(), weight.grad
        P_A, P_B = torch.linalg.pinv(A) @ A, B @ torch.linalg.pinv(B)
        arguments = (A, B, layer.A.grad, layer.B.grad, layer.s)
        torch.testing.assert_close(full_gradient(*arguments, "B", A.dtype), G @ P_A)
        torch.testing.assert_close(full_gradient(*arguments, "average", A.dtype), (G @ P_A + P_B @ G) / 2)
        tangent = G @ P_A + P_B @ G - P_B @ G @ P_A
        torch.testing.assert_close(full_gradient(*arguments, "tangent", A.dtype), tangent)


def merged_perturbation(model: nn.Module, optimizer: FlatLoRA) -> list[Tensor]:
    """s·E_B·A of each layer, as the optimizer makes it from the gradients that are there."""
    space = optimizer.full_space
    found, _ = space.perturbation(optimizer.radius.at(0), optimizer.grad_estimate, optimizer.norm)
    return [f.scaling * E @ f.A.detach() for f, E in zip(space.factors, found, strict=True)]


def make(model: nn.Module, **options: Any) -> FlatLoRA:
    return FlatLoRA(torch.optim.SGD(trainable(model), lr=0.1), model, **options)


def test_the_merged_perturbation_is_the_projected_full_one() -> None:
    """s·E_B·A = rho·(Ḡ/‖Ḡ‖)·P_A."""
    model = trained()
    optimizer = make(model, rho=0.3)
    problem(model)()
    ours = merged_perturbation(model, optimizer)
    expected = []
    for f in optimizer.full_space.factors:
        A, B = f.A.detach(), f.B.detach()
        expected.append(full_gradient(A, B, f.A.grad, f.B.grad, f.scaling, "average", A.dtype))
    total = sum(float(G.norm()) ** 2 for G in expected) ** 0.5
    for E, f, G in zip(ours, optimizer.full_space.factors, expected, strict=True):
        A = f.A.detach()
        torch.testing.assert_close(E, 0.3 * G / total @ torch.linalg.pinv(A) @ A)


@pytest.mark.parametrize("estimate", ["average", "tangent"])
def test_the_perturbation_carried_by_the_other_factor(estimate: str) -> None:
    """E_A = (1/s)·B⁺·E_W with explicit matrices, so that s·B·E_A = P_B·E_W."""
    model = trained()
    optimizer = make(model, rho=0.3, factor="A", grad_estimate=estimate)
    problem(model)()
    space, full = optimizer.full_space, []
    for f in space.factors:
        A, B = f.A.detach(), f.B.detach()
        full.append(full_gradient(A, B, f.A.grad, f.B.grad, f.scaling, estimate, A.dtype))
    total = sum(float(G.norm()) ** 2 for G in full) ** 0.5
    found, _ = space.perturbation(0.3, estimate, "global")  # type: ignore[arg-type]
    for f, E, G in zip(space.factors, found, full, strict=True):
        expected = torch.linalg.pinv(f.B.detach()) @ (0.3 * G / total) / f.scaling
        torch.testing.assert_close(E, expected, rtol=1e-8, atol=1e-12)
    before = [f.B.detach().clone() for f in space.factors]
    optimizer.perturb()
    assert all(torch.equal(old, f.B) for old, f in zip(before, space.factors, strict=True))


def test_norm_is_rho_at_the_start_and_below_it_later() -> None:
    start = adapted()
    optimizer = make(start, rho=0.3)
    optimizer.step(problem(start))
    assert float(optimizer.perturbation_norm) == pytest.approx(0.3, rel=1e-10)
    later = trained()
    optimizer = make(later, rho=0.3)
    problem(later)()
    realised = sum(float(E.norm()) ** 2 for E in merged_perturbation(later, optimizer)) ** 0.5
    optimizer.step(problem(later))
    assert float(optimizer.perturbation_norm) == pytest.approx(realised, rel=1e-9)
    assert 0.15 < realised < 0.3


@pytest.mark.parametrize("estimate", ["average", "B", "tangent"])
def test_invariant_under_a_change_of_factors(estimate: str) -> None:
    """(B·M)(M⁻¹·A) is the same model, and is perturbed in the same way in W."""
    model = trained()
    problem(model)()
    before = merged_perturbation(model, make(model, grad_estimate=estimate))
    torch.manual_seed(3)
    with torch.no_grad():
        for f in lora_factors(model):
            M = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
            f.B.copy_(f.B @ M)
            f.A.copy_(torch.linalg.inv(M) @ f.A)
    problem(model)()
    for old, new in zip(before, merged_perturbation(model, make(model, grad_estimate=estimate)), strict=True):
        torch.testing.assert_close(old, new, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_factors_count_as_their_pseudo_inverses(dtype: torch.dtype) -> None:
    model = trained(dtype=dtype)
    with torch.no_grad():
        for f in lora_factors(model):
            f.B[:, 1] = 0  # an exact zero column
            f.B[:, 2] = f.B[:, 3]  # an exact dependence
    problem(model)()
    optimizer = make(model, rho=0.3)
    ours, _ = optimizer.full_space.perturbation(0.3, "average", "global")
    layers_there = [Layer(f.A, f.B, f.scaling) for f in optimizer.full_space.factors]
    reference = Reference(layers_there, torch.optim.SGD(trainable(model)), rho=0.3)
    for own, expected in zip(ours, reference.perturbations(), strict=True):
        assert relative(own, expected) <= (1e-5 if dtype == torch.float32 else 1e-10)


def test_closed_form_on_a_quadratic() -> None:
    """L(W) = ½·tr((W - T)·H·(W - T)ᵀ): the perturbed gradient is that of W + rho·G·P_A/‖G·P_A‖ at B = 0."""
    torch.manual_seed(0)
    model = adapted(2)
    f = lora_factors(model)[1]
    for other in lora_factors(model):
        other.A.requires_grad_(other.name == f.name)
        other.B.requires_grad_(other.name == f.name)
    W0 = f.layer.base_layer.weight.detach()
    target, root = torch.randn(24, 24, dtype=torch.float64), torch.randn(24, 24, dtype=torch.float64)
    H = root @ root.T
    seen = []

    def closure() -> Tensor:
        model.zero_grad()
        D = W0 + f.scaling * f.B @ f.A - target
        loss = 0.5 * ((D @ H) * D).sum()
        loss.backward()
        seen.append(f.B.grad.clone())
        return loss

    optimizer = FlatLoRA(torch.optim.SGD([f.A, f.B], lr=1e-4), model, rho=0.7)
    A = f.A.detach().clone()
    optimizer.step(closure)
    G = (W0 - target) @ H
    projected = G @ torch.linalg.pinv(A) @ A
    E = 0.7 * projected / projected.norm()
    torch.testing.assert_close(seen[1], f.scaling * (G + E @ H) @ A.T)


def test_extra_memory_of_eflat_lora() -> None:
    model = adapted(4)
    optimizer = EFlatLoRA(torch.optim.SGD(trainable(model), lr=0.1), model)
    optimizer.step(problem(model))
    held = sum(t.numel() for t in [*optimizer._base_point, *optimizer._average])
    assert held <= 2 * sum(f.A.numel() + f.B.numel() for f in lora_factors(model))


@pytest.mark.parametrize("cls", CLASSES.values())
def test_no_lora_layer(cls: Any) -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(InputError, match="no LoRA layer"):
        cls(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1, float("nan")])
def test_bad_beta(beta: float) -> None:
    model = adapted()
    with pytest.raises(ValueError, match="beta"):
        EFlatLoRA(torch.optim.SGD(trainable(model), lr=0.1), model, beta=beta)


def test_a_layer_without_gradient_is_left_alone() -> None:
    model = adapted()
    optimizer = make(model)
    problem(model)()
    first = optimizer.full_space.factors[0]
    first.A.grad = first.B.grad = None
    found, skipped = optimizer.full_space.perturbation(0.3, "average", "global")
    assert not found[0].any()
    assert found[1].any()
    assert not skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", CLASSES.values())
def test_diverged_weights_raise_no_error_of_linear_algebra(cls: Any, dtype: torch.dtype) -> None:
    """What the loss says about them is for the training loop to see."""
    model = trained(dtype=dtype)
    lora_factors(model)[0].B.data[3, 1] = float("nan")
    lora_factors(model)[1].A.data[0, 0] = float("inf")
    optimizer = cls(torch.optim.SGD(trainable(model), lr=0.1), model)
    optimizer.step(problem(model))
    assert int(optimizer.skipped_perturbations) == 1
    assert float(optimizer.perturbation_norm) == 0 or not torch.isfinite(optimizer.perturbation_norm)


def test_low_precision_parameters() -> None:
    model = trained(dtype=torch.bfloat16)
    problem(model)()
    space = make(model, rho=0.3).full_space
    found, _ = space.perturbation(0.3, "average", "global")
    assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in found)
    assert 0.1 < float(space.norm_of(found)) <= 0.3
