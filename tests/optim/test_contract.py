"""What every registered optimizer must do; a new one is tested the moment it is listed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flatbench import optim
from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim.base import WrappedOptimizer
from flatbench.store import training_state
from tests.optim.models import adapted, problem, snapshot, trainable

NAMES = optim.REGISTRY.names()


#: methods with a radius or a strength that do not look at gradients, so that a useless one makes no
#: difference: noise, and a comparison of weights
BLIND = {"flat_lora_rwp", "obar"}


def accepts(name: str, option: str) -> bool:
    return option in optim.REGISTRY.options(name).model_fields


def make(name: str, model: nn.Module, lr: float = 1e-2, **options: Any) -> WrappedOptimizer:
    if name == "ivon" and lr == 1e-2:  # it steps by the gradient's length, as SGD does
        lr = 1.0
    base = torch.optim.AdamW(trainable(model), lr=lr)
    for option, value in (("total_steps", 20), ("ess", 1e4)):
        if accepts(name, option):
            options.setdefault(option, value)
    optimizer: WrappedOptimizer = optim.REGISTRY.load(name)(base, model, **options)
    return optimizer


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_is_a_torch_optimizer(name: str) -> None:
    optimizer = make(name, adapted())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert type(optimizer).__name__ in repr(optimizer)
    assert optim.REGISTRY.describe(name).endswith(".")


def test_the_loss_falls(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model, **({"decay": 0.5} if name == "ema" else {})), problem(model)
    first = float(closure().detach())
    for _ in range(20):
        optimizer.step(closure)
    optimizer.eval()
    assert float(closure().detach()) < 0.8 * first


def test_gradients_per_step(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    calls = []

    def counting() -> Tensor:
        calls.append(1)
        return closure()

    for _ in range(10):
        before, expected = len(calls), optimizer.gradients_of_next_step
        optimizer.step(counting)
        asked = len(calls) - before
        assert asked == expected, (
            f"a step asked for {asked} gradients; gradients_of_next_step said {expected}"
        )
    assert len(calls) == pytest.approx(10 * optimizer.gradients_per_step)


def test_closure_is_asked_for_or_not(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    closure()
    if optimizer.gradients_per_step > 1:
        with pytest.raises(ValueError, match="two gradients a step"):
            optimizer.step()
        return
    twin = copy.deepcopy(model)
    other, twin_closure = make(name, twin), problem(twin)
    for _ in range(3):
        optimizer.train()
        closure()
        optimizer.step()
        other.step(twin_closure)
    optimizer.eval()
    other.eval()
    assert equal(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resumes_bit_exactly(name: str, mode: str, tmp_path: Any) -> None:
    """State and model go through files in either mode; the rest of the run is the same."""
    model = adapted(dtype=torch.float32)
    optimizer, closure = make(name, model), problem(model)
    for _ in range(26):  # more than any period by default, and not a multiple of one
        optimizer.step(closure)
    getattr(optimizer, mode)()
    training_state.save(tmp_path / "s", {"optimizer": optimizer.state_dict(), "model": snapshot(model)})
    stored = training_state.load(tmp_path / "s")
    twin = adapted(dtype=torch.float32, seed=5)
    twin.load_state_dict(stored["model"])
    resumed, twin_closure = make(name, twin), problem(twin)
    resumed.load_state_dict(stored["optimizer"])
    for _ in range(26):
        optimizer.step(closure)
        resumed.step(twin_closure)
    lost = f"{name} resumed from its state_dict goes another way: what it keeps belongs into `_own_state`"
    assert equal(snapshot(model), snapshot(twin)), lost
    optimizer.eval()
    resumed.eval()
    assert equal(snapshot(model), snapshot(twin)), lost


def test_saving_disturbs_nothing(name: str) -> None:
    model = adapted(dtype=torch.float32)
    twin = copy.deepcopy(model)
    optimizer, other = make(name, model), make(name, twin)
    closure, twin_closure = problem(model), problem(twin)
    for _ in range(6):
        optimizer.step(closure)
        other.step(twin_closure)
        optimizer.eval()
        optimizer.eval()
        optimizer.state_dict()
        optimizer.train()
        optimizer.train()
    assert equal(snapshot(model), snapshot(twin))


def test_eval_gives_the_point_that_the_base_optimizer_made(name: str) -> None:
    model = adapted(dtype=torch.float32)
    if not getattr(optim.REGISTRY.load(name), "away_when_training", True):
        pytest.skip("the point that is evaluated is an average by design; see test_averaging.py")
    optimizer, closure = make(name, model, **({"rho": 0.5} if accepts(name, "rho") else {})), problem(model)
    points = []
    optimizer.base.register_step_post_hook(lambda *_: points.append(snapshot(model)))
    for _ in range(3):
        optimizer.step(closure)
        optimizer.eval()
        assert equal(snapshot(model), points[-1])
        optimizer.train()


def test_another_methods_state_is_refused(name: str) -> None:
    model = adapted()
    optimizer = make(name, model)
    with pytest.raises(ValueError, match="not a state"):
        optimizer.load_state_dict(torch.optim.AdamW(trainable(model)).state_dict())
    other = make("sam" if name != "sam" else "plain", adapted()).state_dict()
    with pytest.raises(ValueError, match="not a state of"):
        optimizer.load_state_dict(other)


def test_a_method_of_adapters_asks_for_one(name: str) -> None:
    if not optim.REGISTRY.load(name).needs_adapter:
        pytest.skip("works on any model")
    with pytest.raises(InputError, match=f"{name} .*no LoRA layer"):
        make(name, nn.Linear(3, 3))


def test_an_exception_leaves_the_unperturbed_weights(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    optimizer.step(closure)
    optimizer.eval()
    before = snapshot(model)
    optimizer.train()
    calls: list[int] = []
    expected = optimizer.gradients_of_next_step

    def failing() -> Tensor:
        calls.append(1)
        if len(calls) == expected:
            raise RuntimeError("out of memory")
        return closure()

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    optimizer.eval()
    assert equal(snapshot(model), before)


def test_schedulers_work_on_it(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model, lr=0.1), problem(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for expected in (0.1, 0.05, 0.025):
        assert optimizer.base.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step(closure)
        scheduler.step()


def test_add_param_group_and_zero_grad(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    groups = len(optimizer.param_groups)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(optimizer.base.param_groups) == groups + 1
    assert optimizer.param_groups[-1]["lr"] == 0.5
    closure()
    optimizer.zero_grad()
    assert all(p.grad is None for p in trainable(model))


def test_clipping_in_a_base_hook_sees_the_last_gradient(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    seen = []

    def clip(*_: Any) -> None:
        seen.append(float(torch.nn.utils.clip_grad_norm_(trainable(model), 1e-3)))

    optimizer.base.register_step_pre_hook(clip)
    optimizer.step(closure)
    norms = torch.stack([p.grad.norm() for p in trainable(model) if p.grad is not None])
    assert float(norms.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert len(seen) == 1


def test_the_same_dropout_masks_in_both_passes(name: str) -> None:
    torch.manual_seed(0)
    model = adapted(dropout=0.5)
    optimizer, closure = make(name, model), problem(model)
    masks = []

    def watch(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        masks.append(output == 0)

    for module in model.modules():
        if type(module) is nn.Dropout and module.p == 0.5:
            module.register_forward_hook(watch)
    calls_expected = optimizer.gradients_of_next_step
    optimizer.step(closure)
    assert len(masks) == calls_expected
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    adapted(dropout=0.5)
    closure()
    assert torch.equal(torch.get_rng_state(), after), "a step draws as much as one pass"


def test_batch_norm_statistics_move_once(name: str) -> None:
    model = adapted()
    norm = nn.BatchNorm1d(20, dtype=torch.float64)
    inner: Any = model
    inner.base_model.model.norm = norm
    inner.base_model.model.first.register_forward_pre_hook(lambda _, arguments: (norm(arguments[0]),))
    twin = copy.deepcopy(norm)
    optimizer = make(name, model)
    x = torch.randn(16, 20, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    twin(x)
    torch.testing.assert_close(norm.running_mean, twin.running_mean)
    torch.testing.assert_close(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked == 1
    assert norm.momentum == 0.1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_gradient_is_counted(name: str, value: float) -> None:
    model = adapted()
    optimizer = make(name, model)

    def closure() -> Tensor:
        for p in trainable(model):
            p.grad = torch.full_like(p, value)
        return torch.tensor(value)

    optimizer.base.register_step_pre_hook(lambda *_: [p.grad.zero_() for p in trainable(model)] and None)
    before = snapshot(model)
    optimizer.step(closure)
    optimizer.eval()
    looks = name not in BLIND and (accepts(name, "rho") or accepts(name, "alpha"))
    assert int(optimizer.skipped_perturbations) == int(looks)
    if looks and accepts(name, "rho"):
        assert float(optimizer.perturbation_norm) == 0
    after = snapshot(model)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert before.keys() == after.keys()


def test_parameters_without_gradient(name: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [unused]})
    for _ in range(2):
        optimizer.step(closure)
    if name == "ivon":  # whose draws are of everything
        optimizer.eval()
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["A frozen", "B frozen", "both frozen", "not reached"])
def test_what_a_step_does_not_train_stays_where_it_is(name: str, kind: str) -> None:
    """Layers that are frozen during training, or that the loss of later steps does not reach."""
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    for _ in range(4):
        optimizer.step(closure)
    (layer, *_), still = lora_factors(model), []
    if kind in ("A frozen", "both frozen", "not reached"):
        still.append(layer.A)
    if kind in ("B frozen", "both frozen", "not reached"):
        still.append(layer.B)

    def later() -> Tensor:
        loss = closure()
        if kind == "not reached":
            for p in still:
                p.grad = None
        return loss

    # an average's evaluated weights go on towards those of training
    look = optimizer.train if name in ("ema", "swa") else optimizer.eval
    look()
    for p in still:
        p.requires_grad_(kind == "not reached")
        p.grad = None
    before = [p.detach().clone() for p in still]
    others = snapshot(model)
    for _ in range(3):
        optimizer.step(later)
    look()
    assert all(torch.equal(p, old) for p, old in zip(still, before, strict=True))
    assert not equal(snapshot(model), others)


def test_accelerate_wraps_it(name: str) -> None:
    model = adapted(dtype=torch.float32)
    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    optimizer, other = make(name, model), make(name, twin)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    closure, twin_closure = problem(prepared_model), problem(twin)
    for _ in range(3):
        prepared.train()
        prepared.step(closure)
        other.step(twin_closure)
    prepared.eval()
    other.eval()
    assert equal(snapshot(model), snapshot(twin))


def test_negative_radius_or_strength(name: str) -> None:
    strength = next((option for option in ("rho", "alpha") if accepts(name, option)), None)
    if strength is None:
        pytest.skip("no radius and no strength")
    with pytest.raises(ValueError, match=strength):
        make(name, adapted(), **{strength: -0.1})
