"""Ten steps of every competing method against its rule written plainly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.errors import InputError
from tests.optim import plain_rules
from tests.optim.models import adapted, layers, problem, trainable

STEPS = 10

#: name in the test -> optimizer, its options, the plain rule and the rule's options
CASES: dict[str, tuple[str, dict[str, Any], Callable[..., None], dict[str, Any]]] = {
    "sam": ("sam", {"rho": 0.1}, plain_rules.sam, {"rho": 0.1}),
    "sam per layer": ("sam", {"rho": 0.1, "norm": "layer"}, plain_rules.sam_per_layer, {"rho": 0.1}),
    "asam": ("asam", {}, plain_rules.asam, {"rho": 0.5}),
    "asam of matrices": ("asam", {"scale_vectors": False}, plain_rules.asam, {"rho": 0.5, "vectors": False}),
    "gsam": ("gsam", {"rho": 0.1}, plain_rules.gsam, {"rho": 0.1}),
    "friendly_sam": ("friendly_sam", {"rho": 0.1}, plain_rules.friendly_sam, {"rho": 0.1, "sigma": 1.0}),
    "friendly_sam 0.5": (
        "friendly_sam",
        {"rho": 0.1, "sigma": 0.5},
        plain_rules.friendly_sam,
        {"rho": 0.1, "sigma": 0.5},
    ),
    "looksam": ("looksam", {"rho": 0.1, "every": 3}, plain_rules.looksam, {"rho": 0.1, "k": 3}),
    "msam": ("msam", {}, plain_rules.msam, {"rho": 0.3, "sign": -1.0}),
    "msam ascending": ("msam", {"direction": "ascent"}, plain_rules.msam, {"rho": 0.3, "sign": 1.0}),
    "lora_mgpo": ("lora_mgpo", {}, plain_rules.mgpo, {"rho": 0.05, "beta": 0.9}),
    "lora_mgpo 0.8": (
        "lora_mgpo",
        {"rho": 0.01, "beta": 0.8},
        plain_rules.mgpo,
        {"rho": 0.01, "beta": 0.8},
    ),
    "obar": ("obar", {"total_steps": 12}, plain_rules.bar, {"kind": "obar", "total": 12}),
    "nbar": ("nbar", {"total_steps": 12}, plain_rules.bar, {"kind": "nbar", "total": 12}),
}


def batches(model: nn.Module) -> list[Callable[[], Tensor]]:
    """Another batch in every step."""
    return [problem(model, seed) for seed in range(STEPS)]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    # an eps that keeps Adam from magnifying the rounding of gradients near zero
    return torch.optim.AdamW(trainable(model), lr=1e-2, eps=1e-3)


def relative(ours: nn.Module, twin: nn.Module) -> float:
    own = torch.cat([p.detach().flatten() for p in trainable(ours)])
    expected = torch.cat([p.detach().flatten() for p in trainable(twin)])
    return float((own - expected).norm() / expected.norm())


@pytest.mark.parametrize("base", [sgd, adamw])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_ten_steps(case: str, dtype: torch.dtype, base: Callable[..., Any]) -> None:
    name, options, rule, arguments = CASES[case]
    model = adapted(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizer = optim.REGISTRY.load(name)(base(model), model, **options)
    twin_base = base(twin)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer.base, twin_base)]
    memory: dict[str, Any] = {}
    if rule in (plain_rules.bar, plain_rules.mgpo):
        arguments = {**arguments, "layers": layers(twin)}
    if rule in (plain_rules.msam, plain_rules.mgpo):
        arguments = {**arguments, "key": "momentum_buffer" if base is sgd else "exp_avg"}
    for closure, twin_closure in zip(batches(model), batches(twin), strict=True):
        optimizer.step(closure)
        rule(twin, twin_base, twin_closure, memory, **arguments)
        for scheduler in schedulers:
            scheduler.step()
    optimizer.eval()
    assert relative(model, twin) <= (1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("case", ["sam", "gsam", "friendly_sam", "looksam"])
def test_a_peer(case: str) -> None:
    """pytorch_optimizer on a model of one tensor, on which LookSAM's norm per tensor is that of all."""
    peer = pytest.importorskip("pytorch_optimizer", reason="a cross-check only: pip install '.[peers]'")
    torch.manual_seed(0)
    start = torch.randn(3, 8)
    x, y = torch.randn(STEPS, 16, 8), torch.randint(0, 3, (STEPS, 16))

    def closure_of(model: nn.Module, i: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            model.zero_grad()
            loss = nn.functional.cross_entropy(torch.tanh(model(x[i])) * 2, y[i])
            loss.backward()
            return loss

        return closure

    def linear() -> nn.Module:
        model = nn.Linear(8, 3, bias=False)
        model.weight.data.copy_(start)
        return model

    ours, theirs = linear(), linear()
    options = {"looksam": {"every": 5}}.get(case, {})
    base = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    optimizer = optim.REGISTRY.load(case)(base, ours, rho=0.1, **options)
    if case == "gsam":
        other_base = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)

        class Constant:
            def step(self) -> float:
                return 0.1

        other = peer.GSAM(theirs.parameters(), other_base, theirs, Constant(), alpha=0.4)
    else:
        cls = {"sam": peer.SAM, "friendly_sam": peer.FriendlySAM, "looksam": peer.LookSAM}[case]
        more = {"k": 5, "alpha": 0.7} if case == "looksam" else {}
        other = cls(theirs.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **more)
    for i in range(STEPS):
        optimizer.step(closure_of(ours, i))
        closure = closure_of(theirs, i)
        if case == "gsam":
            other.step(torch.enable_grad()(lambda closure=closure: (None, closure())))
        else:
            closure()
            other.step(closure)
    assert relative(ours, theirs) <= 1e-6


def test_steps_between_are_the_base_optimizers() -> None:
    model = adapted()
    twin = copy.deepcopy(model)
    optimizer = optim.SAM(sgd(model), model, rho=0.3, every=3)
    base, memory = sgd(twin), {}
    for i, (closure, twin_closure) in enumerate(zip(batches(model), batches(twin), strict=True)):
        optimizer.step(closure)
        if i % 3 == 0:
            plain_rules.sam(twin, base, twin_closure, memory, 0.3)
        else:
            twin_closure()
            base.step()
    assert relative(model, twin) <= 1e-10


def test_asam_perturbs_an_adapter_at_its_start_only_with_eta() -> None:
    for eta, moved in ((0.0, False), (0.01, True)):
        model = adapted()
        problem(model)()
        for name, p in model.named_parameters():
            if p.requires_grad and "lora" not in name:
                p.grad = None
        optimizer = optim.ASAM(sgd(model), model, eta=eta)
        optimizer.perturb()
        assert (float(optimizer.perturbation_norm) > 0) == moved
        assert bool(optimizer.skipped_perturbations) != moved


def test_msam_needs_a_momentum() -> None:
    model = adapted()
    with pytest.raises(InputError, match="momentum"):
        optim.MomentumSAM(torch.optim.SGD(trainable(model), lr=0.1), model)
