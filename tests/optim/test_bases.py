"""Optimizers around optimizers: points within points, and closures that are handed on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.errors import InputError
from flatbench.optim import EMA, SAM, SWA, EFlatLoRA, FlatLoRA, MomentumSAM, Plain, joined
from tests.optim.models import adapted, problem, snapshot, trainable
from tests.optim.reference import Reference

schedulefree = pytest.importorskip("schedulefree")
METHODS = {name: optim.REGISTRY.load(name) for name in optim.REGISTRY.names()}
X = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def adamw(model: nn.Module) -> Any:
    return torch.optim.AdamW(trainable(model), lr=1e-2)


def free(model: nn.Module) -> Any:
    return schedulefree.AdamWScheduleFree(trainable(model), lr=1e-2)


def muon(model: nn.Module) -> Any:
    return joined.build([{"params": trainable(model), "weight_decay": 0.0}], 1e-3, "torch.optim.Muon", {})


def make(name: str, base: Any, model: nn.Module) -> Any:
    known = optim.REGISTRY.options(name).model_fields
    given = {"rho": 0.5, "total_steps": 8, "start": 0.0, "ess": 100.0}
    options = {key: value for key, value in given.items() if key in known}
    return METHODS[name](base, model, **options)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def point(optimizer: Any, model: nn.Module) -> dict[str, Tensor]:
    optimizer.eval()
    return snapshot(model)


#: methods of which schedule-free AdamW is a base, and why not of the others
FREE = [name for name in METHODS if name not in ("obar", "nbar", "msam", "lora_mgpo", "lora_fa", "ivon")]


@pytest.mark.parametrize("name", ["plain", "sam"])
def test_a_schedule_free_base_is_its_own_loop(name: str) -> None:
    model, twin = adapted(), adapted()
    optimizer = make(name, free(model), model)
    base, closure = free(twin), problem(twin)
    base.train()
    for _ in range(4):
        optimizer.step(problem(model))
        closure()
        if name == "sam":
            weights = trainable(twin)
            length = torch.stack([p.grad.norm() for p in weights]).norm()
            before = [p.detach().clone() for p in weights]
            with torch.no_grad():
                for p in weights:
                    p.add_(p.grad * (0.5 / length))
            closure()
            with torch.no_grad():
                for p, w in zip(weights, before, strict=True):
                    p.copy_(w)
        base.step()
    base.eval()
    found = point(optimizer, model)
    for key, value in snapshot(twin).items():
        torch.testing.assert_close(found[key], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["flat_lora", "eflat_lora"])
def test_the_papers_rule_around_a_schedule_free_base(name: str) -> None:
    from tests.optim.models import layers

    model, twin = adapted(), adapted()
    optimizer = make(name, free(model), model)
    base = free(twin)
    base.train()
    reference = Reference(layers(twin), base, 0.5, beta=0.1 if name == "eflat_lora" else None)
    for _ in range(4):
        optimizer.step(problem(model))
        reference.step(problem(twin))
    reference.finish()
    base.eval()
    found = point(optimizer, model)
    for key, value in snapshot(twin).items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", FREE)
def test_evaluating_and_copying_leave_a_schedule_free_base_exactly_where_it_was(name: str) -> None:
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer, other = make(name, free(model), model), make(name, free(twin), twin)
    x = X.float()
    for step in range(5):
        optimizer.step(problem(model))
        other.step(problem(twin))
        twin.eval()
        with torch.inference_mode():
            outputs = twin(x)
        twin.train()
        if step == 2:
            copied, copied_model = copy.deepcopy((other, twin))
            assert torch.equal(copied_model.eval()(x), outputs)
            state, weights = copy.deepcopy(other.state_dict()), snapshot(twin)
            other, twin = copied, copied_model.train()
            third = adapted(dtype=torch.float32, seed=0)
            resumed = make(name, free(third), third)
            resumed.load_state_dict(state)
            third.load_state_dict(weights)
            resumed.step(problem(third))
    assert same(point(optimizer, model), point(other, twin))
    fourth = adapted(dtype=torch.float32)
    shorter = make(name, free(fourth), fourth)
    for _ in range(4):
        shorter.step(problem(fourth))
    assert same(point(shorter, fourth), point(resumed, third))


@pytest.mark.parametrize("name", FREE)
def test_a_schedule_free_base_in_a_plain_loop(name: str) -> None:
    """Its own `train` and `eval` are called for it; without, it refuses to step."""
    model, twin = adapted(), adapted()
    optimizer, other = make(name, free(model), model), make(name, free(twin), twin)
    for _ in range(3):
        problem(model)()
        if hasattr(optimizer, "perturb") and optimizer.perturb():
            problem(model)()
            optimizer.restore()
        optimizer.step()
        other.step(problem(twin))
        model.eval()
        model(X)
        model.train()
    assert same(point(optimizer, model), point(other, twin))
    optimizer.eval()
    problem(model)()
    if not hasattr(optimizer, "perturb"):
        with pytest.raises(InputError, match=r"optimizer\.train\(\)"):
            optimizer.step()


@pytest.mark.parametrize("outer", [SAM, FlatLoRA, EFlatLoRA, Plain, optim.OBAR, optim.RandomPerturbation])
@pytest.mark.parametrize("average", [SWA, EMA])
def test_an_average_inside_is_the_average_outside(outer: Any, average: Any) -> None:
    """`eval` reaches it: what is evaluated is the mean of the base optimizer's points."""
    options = {"start": 0.0} if average is SWA else {"decay": 0.5}
    more = {"total_steps": 8} if outer in (optim.OBAR, optim.RandomPerturbation) else {}
    model, plain = adapted(), adapted()
    inside = outer(average(adamw(model), model, **options), model, **more)
    alone = outer(adamw(plain), plain, **more)
    points = []
    alone.base.register_step_post_hook(
        lambda *_: points.append([p.detach().clone() for p in trainable(plain)])
    )
    for _ in range(4):
        inside.step(problem(model))
        alone.step(problem(plain))
    expected = points[0]
    for index, following in enumerate(points[1:], start=1):
        share = 1 / (index + 1) if average is SWA else 0.5
        expected = [e + (p - e) * share for e, p in zip(expected, following, strict=True)]
    inside.eval()
    for p, value in zip(trainable(model), expected, strict=True):
        torch.testing.assert_close(p.detach(), value)
    inside.train()
    inside.step(problem(model))
    alone.step(problem(plain))
    first, second = (next(iter(o.state.values()))["exp_avg"] for o in (inside, alone))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("inner", [SAM, FlatLoRA, EFlatLoRA, optim.RandomPerturbation, optim.BiLoRA])
def test_an_average_around_a_method(inner: Any) -> None:
    more = {"total_steps": 8} if inner is optim.RandomPerturbation else {}
    model, twin = adapted(), adapted()
    around = EMA(inner(adamw(model), model, **more), model, decay=0.5)
    inside = inner(EMA(adamw(twin), twin, decay=0.5), twin, **more)
    for _ in range(4):
        around.step(problem(model))
        inside.step(problem(twin))
    assert around.gradients_per_step == inner(adamw(adapted()), model, **more).gradients_per_step
    assert same(point(around, model), point(inside, twin))


@pytest.mark.parametrize(
    "chain",
    [
        lambda m: SAM(SWA(adamw(m), m, start=0.0), m),
        lambda m: EFlatLoRA(SWA(adamw(m), m, start=0.0), m),
        lambda m: EMA(EFlatLoRA(adamw(m), m), m, decay=0.5),
        lambda m: EMA(SAM(adamw(m), m), m, decay=0.5),
        lambda m: EMA(free(m), m, decay=0.5),
        lambda m: EFlatLoRA(EMA(free(m), m, decay=0.5), m),
        lambda m: Plain(Plain(free(m), m), m),
        lambda m: EFlatLoRA(optim.LoRAPlus(adamw(m), m), m),
    ],
)
def test_a_chain_resumes_and_evaluates(chain: Any) -> None:
    model = adapted(dtype=torch.float32)
    optimizer = chain(model)
    for _ in range(4):
        optimizer.step(problem(model))
    x = X.float()
    model.eval()
    outputs = model(x).detach()
    model.train()
    weights, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    twin = adapted(dtype=torch.float32)
    other = chain(twin)
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    assert torch.equal(twin.eval()(x), outputs)
    twin.train()
    copied, copied_model = copy.deepcopy((optimizer, model))
    for _ in range(3):
        optimizer.step(problem(model))
        other.step(problem(twin))
        copied.step(problem(copied_model))
    assert same(point(optimizer, model), point(other, twin))
    assert same(point(copied, copied_model), point(other, twin))


@pytest.mark.parametrize(
    ("chain", "words"),
    [
        (lambda m: SAM(SAM(adamw(m), m), m), "SAM"),
        (lambda m: EFlatLoRA(SAM(adamw(m), m), m), "SAM"),
        (lambda m: SAM(EFlatLoRA(adamw(m), m), m), "EFlatLoRA"),
        (lambda m: MomentumSAM(EFlatLoRA(adamw(m), m), m), "EFlatLoRA"),
        (lambda m: EFlatLoRA(EMA(EFlatLoRA(adamw(m), m), m), m), "EFlatLoRA"),
        (lambda m: SWA(EMA(adamw(m), m), m, start=0), "EMA"),
        (lambda m: optim.NBAR(SAM(adamw(m), m), m, total_steps=3), "SAM"),
        (lambda m: optim.OBAR(free(m), m, total_steps=3), "AdamWScheduleFree"),
        (lambda m: SAM(torch.optim.LBFGS(trainable(m)), m), "LBFGS"),
        (lambda m: EFlatLoRA(torch.optim.LBFGS(trainable(m)), m), "LBFGS"),
        (lambda m: SAM(schedulefree.AdamWScheduleFreeClosure(trainable(m)), m), "Closure"),
        (lambda m: SAM(m, m), "PeftModel"),
        (lambda m: optim.LoRAPlus(muon(m), m), "Muon and AdamW"),
        (lambda m: optim.LoRAFA(free(m), m), "AdamWScheduleFree"),
    ],
)
def test_what_cannot_nest_is_refused_by_name(chain: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        chain(adapted())


def test_a_momentum_that_is_not_found_is_refused() -> None:
    """It would be the base optimizer alone, silently."""
    model = adapted()
    optimizer = MomentumSAM(free(model), model)
    with pytest.raises(InputError, match="AdamWScheduleFree keeps none"):
        for _ in range(2):
            optimizer.step(problem(model))


@pytest.mark.parametrize("wrap", [Plain, EMA])
def test_lbfgs_asks_the_closure_itself(wrap: Any) -> None:
    model, twin = adapted(), adapted()
    optimizer = wrap(torch.optim.LBFGS(trainable(model), max_iter=3), model)
    base = torch.optim.LBFGS(trainable(twin), max_iter=3)
    for _ in range(2):
        optimizer.step(problem(model))
        base.step(problem(twin))
    optimizer.train()
    for own, other in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(own, other)
