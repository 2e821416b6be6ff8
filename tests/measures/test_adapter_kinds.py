"""Every kind of adapter in every space, metric and gauge: right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators.model_state import as_found
from flatbench.errors import NotApplicableError
from flatbench.measures.balancedness import Balancedness
from flatbench.measures.balls import Ball
from flatbench.measures.gauge import balanced
from flatbench.measures.sharpness import Sharpness
from flatbench.models.factors import adapted_modules, lora_factors, measured_factors
from flatbench.subject.objective import norm
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.adapter_kinds import KINDS, loss, make
from tests.measures.measure_cases import same, snapshot

SPACES = ("adapter", "merged", "all")
#: (kind, space) -> what the refusal says
REFUSED = {
    ("attention", "adapter"): "twice",
    ("conv2d around", "merged"): r"another function: .* there and .* outside",
    ("conv2d around", "all"): r"another function: .* there and .* outside",
    ("conv1d with holes", "merged"): r"another function: .* there and .* outside",
    ("conv1d with holes", "all"): r"another function: .* there and .* outside",
    ("normed linear", "merged"): r"kept \(Linear\): its weight is computed",
    ("normed linear", "all"): r"kept \(Linear\): its weight is computed",
    ("conv2d in groups", "merged"): r"kept \(Conv2d\).*groups",
    ("conv2d in groups", "all"): r"kept \(Conv2d\).*groups",
}
#: kinds that are no product of two matrices, by what is said of them
NO_FACTORS = {
    "adalora": "AdaLoRA",
    "adalora of conv2d": "AdaLoRA",
    "experts": "stacked experts",
    "conv2d in groups": "grouped",
    "conv2d around": "circular",
    "conv1d with holes": "dilation",
}


def subject(name: str) -> Subject:
    model, batch = make(name)
    return Subject(model, [batch], loss, adapted_modules(model, []), seed=0)


def bits(model: nn.Module) -> dict[str, Any]:
    """A snapshot without identities, which peft's attention changes by itself at each look."""
    return {key: value for key, value in snapshot(model).items() if key not in ("objects", "grad_objects")}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", KINDS)
def test_the_function_and_its_slope(name: str, space: Any) -> None:
    given = subject(name)
    model, (batch,) = given.model.train(), given.batches
    before = bits(model)
    with torch.no_grad(), as_found(model):
        expected = model(**batch).logits
    assert same(before, bits(model))
    if (name, space) in REFUSED:
        with pytest.raises(NotApplicableError, match=REFUSED[name, space]), in_space(given, space):
            pass
        assert same(before, bits(model))
        return
    h = 1e-6
    with in_space(given, space) as point:
        parameters = list(point.parameters.values())
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-12, atol=1e-12)
        slopes = torch.autograd.grad(loss(model, batch)[0], parameters)
        generator = torch.Generator().manual_seed(1)
        step = [torch.randn(p.shape, generator=generator).double() for p in parameters]
        moved = []
        for sign in (h, -h):
            with point.moved(step, sign / norm(step)), torch.no_grad():
                moved.append(float(loss(model, batch)[0]))
        slope = sum(float((g * d).sum()) for g, d in zip(slopes, step, strict=True)) / norm(step)
        if (name, space) != ("dora", "adapter"):  # whose gradient takes norms for constants
            assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(slope, rel=1e-6, abs=1e-8)
        if space == "merged":
            weights = 2 if name in ("attention", "experts") else 1
            assert len(parameters) == weights
            assert all(key.startswith("kept.") for key in point.parameters)
    assert same(before, bits(model))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", [name for name in KINDS if name != "conv2d in groups"])
def test_hessian_products_are_differences_of_gradients(name: str, space: Any) -> None:
    model, batch = make(name)
    if (name, space) in REFUSED or (name, space) == ("dora", "adapter"):
        with pytest.raises(NotApplicableError):
            HessianOperator(model, loss, [batch], space=space).point()
        return
    with HessianOperator(model, loss, [batch], space=space) as hessian:
        v = torch.randn(hessian.dimension, generator=torch.Generator().manual_seed(1)).double()
        product = hessian @ v
    with HessianOperator(model, loss, [batch], space=space, products="differences") as other:
        torch.testing.assert_close(other @ v, product, rtol=1e-4, atol=1e-4 * float(product.norm()))


@pytest.mark.parametrize("name", KINDS)
def test_the_balanced_gauge(name: str) -> None:
    given = subject(name)
    model, (batch,) = given.model, given.batches
    before = bits(model)
    if name == "attention" or name in NO_FACTORS:
        said = NO_FACTORS.get(name, "twice")
        with (
            pytest.raises(NotApplicableError, match=rf"kept.*{said}"),
            in_space(given, "adapter") as point,
            balanced(point),
        ):
            pass
        assert same(before, bits(model))
        return
    with in_space(given, "adapter") as point:
        value = loss(model, batch)[0]
        with balanced(point), torch.no_grad():
            assert float(loss(model, batch)[0]) == pytest.approx(float(value), rel=1e-12)
            for f in lora_factors(model):
                A, B = f.A.flatten(1), f.B.flatten(1)
                torch.testing.assert_close(B.T @ B, A @ A.T)
    assert same(before, bits(model))


@pytest.mark.parametrize("name", KINDS)
def test_the_invariant_metric_is_what_a_step_does_to_the_weight(name: str) -> None:
    """‖u‖² is Σ s²(‖ΔB·A‖² + ‖B·ΔA‖²), the two first-order changes of W, plus the damping's part."""
    given = subject(name)
    floor = 1e-9
    if name == "attention" or name in NO_FACTORS or name == "linear with bias":
        with pytest.raises(NotApplicableError, match=r"kept|A and B only"):
            Sharpness(space="adapter", metric="invariant", rho=[0.1], steps=2)(given)
        return
    with in_space(given, "adapter") as point, balanced(point):
        ball = Ball(point, "invariant", "l2", floor)
        u = ball.inside(0.3, 4)
        step = dict(zip((id(p) for p in point.parameters.values()), ball.step(u), strict=True))
        total = 0.0
        for f in lora_factors(point.model):
            A, B = f.A.detach().flatten(1), f.B.detach().flatten(1)
            dA, dB = step[id(f.A)].flatten(1), step[id(f.B)].flatten(1)
            total += f.scaling**2 * float((dB @ A).square().sum() + (B @ dA).square().sum())
            damping = floor * float((A @ A.T).trace()) / len(A)
            total += f.scaling**2 * damping * float(dA.square().sum() + dB.square().sum())
        assert total == pytest.approx(0.09, rel=1e-6)
        gradient = [torch.randn(p.shape).double() for p in point.parameters.values()]
        pairs = zip(gradient, ball.step(u), strict=True)
        assert float(ball.pulled(gradient) @ u) == pytest.approx(sum(float((g * s).sum()) for g, s in pairs))
    found = Sharpness(space="adapter", metric="invariant", rho=[0.1], steps=3)(given)
    assert found["sharpness"] > 0
    if name.endswith("r over both"):
        with pytest.raises(NotApplicableError, match=r"kept: the invariant metric is zero.*floor above 0"):
            Sharpness(space="adapter", metric="invariant", rho=[0.1], steps=2, floor=0)(given)


@pytest.mark.parametrize("name", KINDS)
def test_balancedness(name: str) -> None:
    given = subject(name)
    if name in NO_FACTORS:
        with pytest.raises(NotApplicableError, match=rf"kept.*{NO_FACTORS[name]}"):
            Balancedness()(given)
        return
    found = Balancedness()(given)
    norms = [(float(f.B.norm()) ** 2, float(f.A.norm()) ** 2) for f in measured_factors(given.model)]
    assert found["balancedness_by_layer"] == pytest.approx([b - a for b, a in norms])


def test_torch_s_fast_path_does_not_pass_over_adapters() -> None:
    """In evaluation mode torch's encoder reads the weights beneath adapters; a space's function has them."""
    import peft

    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
    model: Any = peft.get_peft_model(
        nn.Sequential(encoder, nn.Flatten(1), nn.Linear(12, 3)),
        peft.LoraConfig(r=2, target_modules=["linear1"]),
    ).double()
    for key, p in model.named_parameters():
        if "lora_B" in key:
            p.data.normal_()
    x, y = torch.randn(5, 3, 4).double(), torch.randint(0, 3, (5,))

    def of(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"]), 5

    with torch.no_grad():
        trained = float(of(model.train(), {"x": x, "y": y})[0])
    given = Subject(model, [{"x": x, "y": y}], of, ["0.linear1"], seed=0)
    for space in SPACES:
        with in_space(given, space) as point, torch.no_grad():
            assert float(of(point.model, given.batches[0])[0]) == pytest.approx(trained, rel=1e-12)
    assert torch.backends.mha.get_fastpath_enabled()
