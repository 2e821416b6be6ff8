"""Every kind of adapter under every method: perturbed as documented, or refused by name."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flatbench import optim
from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim.base.full_space import FullSpace, damped_whitening
from tests.optim.geometries import CASES, base_weight, dense, mixed, problem, randomised, tied_gpt2
from tests.optim.models import snapshot, trainable

NAMES = optim.REGISTRY.names()
#: what a method refuses, by name of the case
REFUSED = {
    "lora_fa": {"conv2d", "conv1d", "embedding", "all_kinds", "dora", "two_adapters"},
}


def make(name: str, model: nn.Module, **options: Any) -> Any:
    # ivon steps by the gradient's length, as SGD does
    base = torch.optim.AdamW(trainable(model), lr=1.0 if name == "ivon" else 1e-2)
    known = optim.REGISTRY.options(name).model_fields
    options |= {key: value for key, value in {"total_steps": 20, "ess": 1e4}.items() if key in known}
    return optim.REGISTRY.load(name)(base, model, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_every_method_on_every_geometry(name: str, case: str) -> None:
    model = CASES[case]()
    if case in REFUSED.get(name, ()):
        with pytest.raises(InputError, match=r"(conv|words|linear|transposed)"):
            make(name, model)
        return
    optimizer, closure = make(name, model), problem(model)
    points = []
    optimizer.base.register_step_post_hook(lambda *_: points.append(snapshot(model)))
    first = float(closure().detach())
    for _ in range(6):
        optimizer.step(closure)
    optimizer.eval()
    assert float(closure().detach()) < first
    if "rho" in optim.REGISTRY.options(name).model_fields:
        assert float(optimizer.perturbation_norm) > 0
        assert all(torch.equal(value, points[-1][key]) for key, value in snapshot(model).items())


def perturbed_gradient(model: nn.Module) -> list[Tensor]:
    """The true gradient of each adapted weight, as a matrix of outputs by inputs."""
    factors = lora_factors(model)
    weights = [base_weight(f) for f in factors]
    for weight in weights:
        weight.requires_grad_(True)
    problem(model)()
    found = []
    for f, weight in zip(factors, weights, strict=True):
        G = weight.grad
        transposed = f.kind == "embedding" or getattr(f.layer, "fan_in_fan_out", False)
        found.append(G.T.clone() if transposed else G.flatten(1).clone())
        weight.requires_grad_(False)
        weight.grad = None
    return found


@pytest.mark.parametrize("factor", ["B", "A"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("dora", "two_adapters")])
def test_the_merged_perturbation_is_the_projected_gradient(case: str, factor: Any) -> None:
    """For ``grad_estimate: B``: rho·G·P_A/‖G·P_A‖ where B moves, rho·P_B·G/‖P_B·G‖ where A does."""
    model = randomised(CASES[case]())
    factors = lora_factors(model)
    true = perturbed_gradient(model)
    problem(model)()
    space = FullSpace(model, "test", factor)
    values, skipped = space.perturbation(0.3, "B", "global")
    assert not skipped
    projected, in_A = [], []
    for f, G in zip(factors, true, strict=True):
        A, B = f.A.detach().flatten(1), f.B.detach().flatten(1)
        in_A.append((factor == "A") != (f.kind == "embedding"))
        projected.append(B @ torch.linalg.pinv(B) @ G if in_A[-1] else G @ torch.linalg.pinv(A) @ A)
    total = math.sqrt(sum(float(P.norm()) ** 2 for P in projected))
    by_name = dict(zip((f.name for f in space.factors), values, strict=True))
    for f, P, moves_A in zip(factors, projected, in_A, strict=True):
        E = by_name[f.name]
        assert E.shape == (f.A if moves_A else f.B).shape
        A, B = f.A.detach().flatten(1), f.B.detach().flatten(1)
        realised = f.scaling * (B @ E.flatten(1) if moves_A else E.flatten(1) @ A)
        torch.testing.assert_close(realised, 0.3 * P / total)
    assert float(space.norm_of(values)) == pytest.approx(0.3)


def test_an_embedding_at_its_start_is_perturbed_in_the_factor_that_is_zero() -> None:
    model = mixed(["words"])
    (f,) = lora_factors(model)
    assert not f.A.any()
    problem(model)()
    space = FullSpace(model, "test")
    values, _ = space.perturbation(0.3, "average", "global")
    assert values[0].shape == f.A.shape
    assert float(space.norm_of(values)) == pytest.approx(0.3)


def test_the_direction_matrix_of_dora_is_what_is_perturbed() -> None:
    """With DoRA the gradients are those of W0 + s·B·A before its rows are scaled to the magnitudes."""
    model = mixed(["linear"], use_dora=True)
    (f,) = lora_factors(model)
    true = perturbed_gradient(model)[0]
    problem(model)()
    values, _ = FullSpace(model, "test").perturbation(0.3, "B", "global")
    A = f.A.detach()
    # peft does not differentiate through the rows' norms in the adapter; W0's gradient lacks that factor too
    cosine = torch.cosine_similarity(
        (values[0] @ A).flatten(), (true @ torch.linalg.pinv(A) @ A).flatten(), 0
    )
    assert cosine > 0.99


def test_several_adapters_of_a_layer_are_perturbed_each() -> None:
    model = randomised(CASES["two_adapters"]())
    names = [(f.name.rpartition(".")[2], f.adapter) for f in lora_factors(model)]
    assert sorted(names) == [("linear", "default"), ("linear", "second"), ("transposed", "second")]
    problem(model)()
    space = FullSpace(model, "test")
    values, _ = space.perturbation(0.3, "average", "global")
    assert all(value.any() for value in values)
    inner: Any = model
    inner.base_model.set_adapter("default")
    assert [f.adapter for f in lora_factors(model)] == ["default"]


def noise_of(model: nn.Module, seed: int) -> tuple[list[Tensor], list[Tensor], Any]:
    """Stored weights of the adapted modules without and with noise."""
    factors = lora_factors(model)
    clean = [base_weight(f).detach().clone() for f in factors]
    optimizer = make("flat_lora_rwp", model, rho=0.3, rho_schedule="constant", seed=seed)
    optimizer.train()
    noisy = [base_weight(f).detach().clone() for f in factors]
    optimizer.eval()
    assert all(torch.equal(base_weight(f), weight) for f, weight in zip(factors, clean, strict=True))
    return clean, noisy, optimizer


@pytest.mark.parametrize("case", ["linear", "conv1d_of_gpt2", "conv2d", "embedding"])
def test_noise_has_the_published_deviation_in_every_geometry(case: str) -> None:
    model = randomised(CASES[case]())
    (f,) = lora_factors(model)
    squares, draws = 0.0, 60
    for seed in range(draws):
        (clean,), (noisy,), _ = noise_of(model, seed)
        merged, noise = (clean + f.scaling * dense(f, f.A.detach(), f.B.detach())), noisy - clean
        if f.kind == "embedding" or getattr(f.layer, "fan_in_fan_out", False):
            merged, noise = merged.T, noise.T
        rows, noise = merged.flatten(1).norm(dim=1), noise.flatten(1)
        deviation = 0.3 / math.sqrt(noise.shape[1]) * rows
        squares += float((noise / deviation[:, None]).square().mean())
    assert squares / draws == pytest.approx(1, abs=5 * math.sqrt(2 / (draws * clean.numel())))


def test_noise_counts_all_adapters_of_a_layer() -> None:
    model = randomised(CASES["two_adapters"]())
    squares: dict[str, float] = {}
    for seed in range(60):
        clean, noisy, _ = noise_of(model, seed)
        added = {
            f.name: after - before for f, before, after in zip(lora_factors(model), clean, noisy, strict=True)
        }
        for name, noise in added.items():
            squares[name] = squares.get(name, 0.0) + float(noise.square().sum()) / 60
    for name in squares:
        factors = [f for f in lora_factors(model) if f.name == name]
        merged = base_weight(factors[0]).detach() + sum(
            f.scaling * dense(f, f.A.detach(), f.B.detach()) for f in factors
        )
        # ‖noise‖² has mean Σ_i m·(rho/√m·‖W_i‖)²
        assert squares[name] == pytest.approx(0.09 * float(merged.norm()) ** 2, rel=0.15)


@pytest.mark.parametrize("case", ["linear", "conv1d_of_gpt2", "conv2d", "conv1d", "embedding"])
def test_bi_lora_s_second_adapter_acts_as_a_change_of_the_weight(case: str) -> None:
    model = CASES[case]()
    optimizer = make("bi_lora", model)
    (second,) = optimizer._seconds
    with torch.no_grad():
        second.A.normal_()
        second.B.normal_()
    closure, f = problem(model), second.factors
    optimizer.train()
    active = float(closure().detach())
    optimizer.eval()
    plain = float(closure().detach())
    weight = base_weight(f)
    weight.data += dense(f, second.A.detach(), second.B.detach())
    assert float(closure().detach()) == pytest.approx(active, rel=1e-10)
    assert plain != pytest.approx(active, rel=1e-6)


def test_tied_weights() -> None:
    """GPT-2's head is its embedding: noise in one weight that two adapters follow is refused."""
    model = tied_gpt2(["wte", "lm_head", "c_attn"])
    with pytest.raises(InputError, match=r"lm_head and .*wte share"):
        make("flat_lora_rwp", model)
    words = torch.randint(0, 17, (3, 6))

    def closure() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(input_ids=words, labels=words).loss
        loss.backward()
        return loss

    for name in ("flat_lora", "eflat_lora", "bi_lora", "sam"):
        model = tied_gpt2(["wte", "lm_head", "c_attn"])
        optimizer = make(name, model)
        before = float(closure().detach())
        for _ in range(5):
            optimizer.step(closure)
        optimizer.eval()
        assert float(closure().detach()) < before


def test_tied_adapters_are_moved_once() -> None:
    model = tied_gpt2(["wte", "lm_head", "c_attn"], ensure_weight_tying=True)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    names = [f.name for f in lora_factors(model)]
    assert [name.rpartition(".")[2] for name in adapted if name not in names] == ["lm_head"]
    storages = [f.A.untyped_storage().data_ptr() for f in lora_factors(model)]
    storages += [f.B.untyped_storage().data_ptr() for f in lora_factors(model)]
    assert len(storages) == len(set(storages))


def test_grouped_convolutions_are_refused_by_name() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 4, 3, groups=2)

    with pytest.warns(UserWarning, match="groups"):
        model = peft.get_peft_model(Grouped(), peft.LoraConfig(r=2, target_modules=["grouped"]))
    with pytest.raises(InputError, match=r"grouped \(Conv2d\).*target_modules"):
        lora_factors(model)


@pytest.mark.parametrize(("frozen", "factor", "other"), [("B", "B", "A"), ("A", "A", "B")])
def test_a_frozen_factor_that_would_move_is_refused_by_name(frozen: str, factor: str, other: str) -> None:
    model = mixed(["linear", "transposed"])
    f = next(f for f in lora_factors(model) if f.name.endswith("linear"))
    (f.A if frozen == "A" else f.B).requires_grad_(False)
    for name in ("flat_lora", "eflat_lora"):
        with pytest.raises(InputError, match=rf"{frozen} of .*linear is frozen.*factor: {other}"):
            make(name, model, factor=factor)
    for name in ("obar", "nbar"):
        with pytest.raises(InputError, match=rf"{frozen} of .*linear is frozen"):
            make(name, model)


def test_a_frozen_partner_leaves_the_first_estimate_alone() -> None:
    model = randomised(mixed(["linear"]))
    (f,) = lora_factors(model)
    f.A.requires_grad_(False)
    problem(model)()
    space = FullSpace(model, "test")
    for estimate in ("average", "tangent"):
        values, _ = space.perturbation(0.3, estimate, "global")  # type: ignore[arg-type]
        expected, _ = space.perturbation(0.3, "B", "global")
        torch.testing.assert_close(values[0], expected[0])
    f.B.requires_grad_(False)
    with pytest.raises(InputError, match="no LoRA layer of the model trains"):
        FullSpace(model, "flat_lora")


def test_half_precision_of_real_width_is_perturbed() -> None:
    """A cut-off of width times bfloat16's eps would leave nothing of a layer of 1024."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(1024, 1024)), peft.LoraConfig(r=8, target_modules=["0"])
    ).to(torch.bfloat16)
    (f,) = lora_factors(model)
    with torch.no_grad():
        f.B.normal_()
    model(torch.randn(4, 1024).bfloat16()).float().square().mean().backward()
    space = FullSpace(model, "test")
    values, skipped = space.perturbation(0.3, "B", "global")
    assert not skipped
    assert float(space.norm_of(values)) == pytest.approx(0.3, rel=1e-2)


@pytest.mark.parametrize("r", [1, 4, 16])
def test_the_whitening_that_an_accelerator_uses(r: int) -> None:
    """One damped Cholesky factorisation: that of a pseudo-inverse if well conditioned, finite always."""
    torch.manual_seed(0)
    tall = torch.randn(3, 40, r, dtype=torch.float64)
    tall[1] *= 1e-6
    tall[2] = 0
    T = damped_whitening(tall, 40 * torch.finfo(torch.float32).eps)
    for X, t in zip(tall[:2], T[:2], strict=True):
        torch.testing.assert_close(t @ t.T, torch.linalg.pinv(X.T @ X, rtol=1e-12), rtol=1e-5, atol=0)
    assert not T[2].any()
    deficient = torch.randn(1, 40, 1, dtype=torch.float64) @ torch.randn(1, 1, r, dtype=torch.float64)
    T = damped_whitening(deficient, 40 * torch.finfo(torch.float32).eps)
    Q = deficient @ T
    assert torch.isfinite(T).all()
    assert torch.linalg.matrix_norm(Q[0], 2) == pytest.approx(1, abs=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["sam", "flat_lora", "eflat_lora", "obar", "bi_lora", "msam"])
def test_quantised_bases(name: str, bits: int) -> None:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    layer = layer.to("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = nn.Sequential(layer)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(8, 64, device=next(model.parameters()).device)
    optimizer = make(name, model)

    def closure() -> Tensor:
        model.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    before = float(closure().detach())
    for _ in range(5):
        optimizer.step(closure)
    optimizer.eval()
    assert float(closure().detach()) < before
    with pytest.raises(InputError, match="0 is quantised"):
        make("flat_lora_rwp", model)
