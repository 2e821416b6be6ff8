"""Every kind of adapter under every method: as a plain reference has it, or refused by name."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.curvature.operators.entrance import entered
from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim.base.full_space import FullSpace
from tests.adapter_kinds import KINDS, loss, make
from tests.optim.geometries import tied_gpt2
from tests.optim.models import trainable
from tests.shared_cases import Halves

NAMES = optim.REGISTRY.names()
#: no product of two matrices: refused by what needs the factors
NO_FACTORS = {
    "adalora",
    "adalora of conv2d",
    "experts",
    "conv2d in groups",
    "conv2d around",
    "conv1d with holes",
}
PARAMETERS = {"in_proj_weight", "parameter", "square parameter", "weight as parameter"}
CONVOLUTIONS = {name for name in KINDS if name.startswith("conv")}
REFUSED = {
    **dict.fromkeys(("obar", "nbar", "lora_plus", "lora_mgpo"), NO_FACTORS),
    **{name: NO_FACTORS | {"attention"} for name in ("flat_lora", "eflat_lora")},
    "bi_lora": NO_FACTORS | {"attention"} | PARAMETERS,
    "flat_lora_rwp": NO_FACTORS | {"attention", "normed linear"} | PARAMETERS,
    "lora_fa": NO_FACTORS
    | {"attention", "embedding", "scaled embedding", "dora"}
    | PARAMETERS
    | CONVOLUTIONS,
}


def optimizer_for(name: str, model: nn.Module, **options: Any) -> Any:
    known = optim.REGISTRY.options(name).model_fields
    options |= {key: value for key, value in {"total_steps": 20, "ess": 1e4}.items() if key in known}
    lr = 1.0 if name == "ivon" else 1e-2  # it steps by the gradient's length, as SGD does
    return optim.REGISTRY.load(name)(torch.optim.AdamW(trainable(model), lr=lr), model, **options)


def closure_of(model: nn.Module, batch: Any) -> Any:
    def closure() -> Tensor:
        model.zero_grad()
        found = loss(model, batch)[0]
        found.backward()
        return found

    return closure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_on_every_kind(name: str, kind: str) -> None:
    model, batch = make(kind, started=False)
    if kind in REFUSED.get(name, ()):
        with pytest.raises(InputError, match=r"kept"):
            optimizer_for(name, model)
        return
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if not p.requires_grad}
    optimizer, closure = optimizer_for(name, model), closure_of(model, batch)
    before = float(closure().detach())
    for _ in range(8):
        optimizer.step(closure)
    optimizer.eval()
    assert float(closure().detach()) < before
    for key, p in model.named_parameters():
        if key in frozen and kind != "attention":  # peft's own attention adds to its weights and subtracts
            assert torch.equal(p, frozen[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_sam_moves_every_factor_along_its_gradient(kind: str) -> None:
    model, batch = make(kind)
    optimizer = optimizer_for("sam", model, rho=0.1)
    closure_of(model, batch)()
    own = trainable(model)
    before = [p.detach().clone() for p in own]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own]
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    optimizer.perturb()
    for p, w, g in zip(own, before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), w + 0.1 * g / length)
    closure_of(model, batch)()
    optimizer.restore()
    assert all(torch.equal(p, w) for p, w in zip(own, before, strict=True))


def stored(f: Any, matrix: Tensor, shape: torch.Size) -> Tensor:
    """A matrix of outputs by inputs as the module stores its weight."""
    turned = f.kind == "embedding" or getattr(f.layer, "fan_in_fan_out", False)
    return (matrix.T if turned else matrix).reshape(shape)


def merged_gradient(model: nn.Module, batch: Any, f: Any) -> Tensor:
    """The gradient of the merged weight itself, as a matrix of outputs by inputs."""
    with entered(model, "merged") as parameters:
        (G,) = torch.autograd.grad(loss(model, batch)[0], list(parameters.values()))
    turned = f.kind == "embedding" or getattr(f.layer, "fan_in_fan_out", False)
    return G.T if turned else G.flatten(1)


@pytest.mark.parametrize("factor", ["B", "A"])
@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k not in NO_FACTORS | {"attention", "dora", "normed linear"}]
)
def test_flat_lora_moves_the_weight_along_its_projected_gradient(kind: str, factor: Any) -> None:
    model, batch = make(kind)
    (f,) = lora_factors(model)
    G = merged_gradient(model, batch, f)
    closure_of(model, batch)()
    space = FullSpace(model, "test", factor)
    (E,), skipped = space.perturbation(0.3, "B", "global")
    assert not skipped
    A, B, E = f.A.detach().flatten(1), f.B.detach().flatten(1), E.flatten(1)
    in_A = (factor == "A") != (f.kind == "embedding")
    projected = B @ torch.linalg.pinv(B) @ G if in_A else G @ torch.linalg.pinv(A) @ A
    realised = f.scaling * (B @ E if in_A else E @ A)
    torch.testing.assert_close(realised, 0.3 * projected / projected.norm())


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k not in REFUSED["bi_lora"] | {"dora", "normed linear"}]
)
def test_bi_lora_is_a_change_of_the_weight(kind: str) -> None:
    model, batch = make(kind)
    plain = copy.deepcopy(model)
    optimizer = optimizer_for("bi_lora", model)
    (second,) = optimizer._seconds
    with torch.no_grad():
        second.A.normal_()
        second.B.normal_()
    optimizer.train()
    with torch.no_grad():
        found = loss(model, batch)[0]
        (f,) = lora_factors(plain)
        base: Any = f.layer.get_base_layer()
        base.weight += stored(f, second.B.flatten(1) @ second.A.flatten(1), base.weight.shape)
        torch.testing.assert_close(loss(plain, batch)[0], found)


def test_noise_in_a_weight_that_others_use_is_refused_by_name() -> None:
    """One side of a tied weight adapted; two parameters over one memory; a module in two places."""
    import peft

    for target, other in (("wte", "lm_head"), ("lm_head", "wte")):
        with pytest.raises(InputError, match=rf"flat_lora_rwp: .*{target} shares .*{other}"):
            optimizer_for("flat_lora_rwp", tied_gpt2([target]))
    optimizer_for("flat_lora_rwp", tied_gpt2(["c_attn"]))
    for target, other in (("head", "words"), ("last", "first"), ("first", "(again|last)")):
        model = peft.get_peft_model(Halves(), peft.LoraConfig(r=2, target_modules=[target]))
        with pytest.raises(InputError, match=rf"{target} shares .*{other}"):
            optimizer_for("flat_lora_rwp", model)
