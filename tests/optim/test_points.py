"""Where the weights are: copies, inner modules, evaluations in the middle of a step, and resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatbench import optim
from flatbench.errors import InputError
from flatbench.optim.base.two_points import TwoPoints
from tests.optim.models import TwoLayers, adapted, problem, snapshot

METHODS = {name: optim.REGISTRY.load(name) for name in optim.REGISTRY.names()}
#: methods with two points, and those of them that are away in training
BOTH = [name for name, kind in METHODS.items() if issubclass(kind, TwoPoints)]
AWAY = [name for name in BOTH if METHODS[name].away_when_training]
X = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def make(name: str, model: nn.Module, **options: Any) -> Any:
    known = optim.REGISTRY.options(name).model_fields
    defaults = {"rho": 0.5, "total_steps": 8, "decay": 0.5, "start": 0.0, "ess": 100.0}
    options = {**{key: value for key, value in defaults.items() if key in known}, **options}
    if name == "flat_lora_rwp":
        options.setdefault("rho_schedule", "constant")
    parameters = [p for p in model.parameters() if p.requires_grad]
    return optim.REGISTRY.load(name)(torch.optim.AdamW(parameters, lr=1e-2), model, **options)


def plain_step(optimizer: Any, model: nn.Module, closure: Any = None) -> None:
    """A step of a loop that calls neither `train` nor `eval`."""
    (closure or problem(model))()
    if hasattr(optimizer, "perturb") and optimizer.perturb():
        (closure or problem(model))()
        optimizer.restore()
    optimizer.step()


def trained(name: str, steps: int = 4, **options: Any) -> tuple[Any, Any]:
    model = adapted()
    optimizer = make(name, model, **options)
    for _ in range(steps):
        plain_step(optimizer, model)
    return model, optimizer


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def reference(name: str, steps: int, **options: Any) -> dict[str, Tensor]:
    """What closures give, which need nobody to move the weights."""
    model = adapted()
    optimizer = make(name, model, **options)
    for _ in range(steps):
        optimizer.step(problem(model))
    optimizer.eval()
    return snapshot(model)


# -- a loop that calls neither train() nor eval() ---------------------------------------------------------


@pytest.mark.parametrize("name", list(METHODS))
def test_a_plain_loop_is_the_loop_of_closures(name: str) -> None:
    """From the first step on: noise and second adapters are there when its gradient is taken."""
    model, optimizer = trained(name)
    optimizer.eval()
    assert same(snapshot(model), reference(name, 4))


def evaluate(model: nn.Module, how: str) -> None:
    model.eval()
    with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[how]():
        model(X)
    model.train()


@pytest.mark.parametrize("how", ["grad", "no_grad", "inference", "eval()", "state_dict", "deepcopy"])
@pytest.mark.parametrize("name", list(METHODS))
def test_an_evaluation_between_backward_and_step(name: str, how: str) -> None:
    model = adapted()
    optimizer = make(name, model)
    for _ in range(4):
        problem(model)()
        if hasattr(optimizer, "perturb") and optimizer.perturb():
            problem(model)()
            optimizer.restore()
        if how == "eval()":
            optimizer.eval()
        elif how == "state_dict":
            model.state_dict()
        elif how == "deepcopy":
            copy.deepcopy(model)
        else:
            evaluate(model, how)
        optimizer.step()
    optimizer.eval()
    assert same(snapshot(model), reference(name, 4))


@pytest.mark.parametrize("name", [*AWAY, "swa"])
def test_evaluating_between_micro_batches(name: str) -> None:
    found = []
    for evaluates in (False, True):
        model = adapted()
        optimizer = make(name, model)
        for _ in range(4):
            model.zero_grad()
            for seed in (1, 2):
                loss = nn.functional.cross_entropy(model(X + seed), torch.arange(8) % 3)
                loss.backward()
                if evaluates:
                    evaluate(model, "no_grad")
            optimizer.step()
        optimizer.eval()
        found.append(snapshot(model))
    assert same(*found)


@pytest.mark.parametrize("name", ["msam", "flat_lora_rwp"])
def test_the_radius_of_a_step_stays_while_the_learning_rate_changes(name: str) -> None:
    """A schedule acts between two steps; an evaluation after it must find the way back to the same point."""
    found = []
    for evaluates in (False, True):
        model = adapted()
        optimizer = make(name, model, rho_schedule="lr")
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(4):
            plain_step(optimizer, model)
            scheduler.step()
            if evaluates:
                evaluate(model, "no_grad")
        optimizer.eval()
        found.append(snapshot(model))
    assert same(*found)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", AWAY)
def test_gradients_of_the_other_point_are_refused(name: str, set_to_none: bool) -> None:
    model, optimizer = trained(name)
    optimizer.eval()
    before = snapshot(model)
    with pytest.raises(InputError, match=r"optimizer\.train\(\)"):
        plain_step(optimizer, model)
    model.eval()  # a model that trains in evaluation mode, to switch dropout off
    with pytest.raises(InputError, match=r"model\.train\(\)"):
        plain_step(optimizer, model)
    optimizer.eval()
    assert same(snapshot(model), before)
    model.train()
    model.zero_grad(set_to_none=set_to_none)
    optimizer.train()
    model.zero_grad()
    plain_step(optimizer, model)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_model_that_trains_in_evaluation_mode_by_closures(name: str) -> None:
    model = adapted().eval()
    optimizer = make(name, model)
    for _ in range(4):
        optimizer.step(problem(model))
    optimizer.eval()
    assert same(snapshot(model), reference(name, 4))


# -- modules around and within ----------------------------------------------------------------------------


class Around(nn.Module):
    """A script's own module around the model, as Lightning's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def around(name: str) -> tuple[Any, Any, Any, Tensor, dict[str, Tensor]]:
    inner = adapted()
    model = Around(inner)
    optimizer = make(name, model)
    for _ in range(4):
        optimizer.step(problem(model))
    optimizer.eval()
    outputs, weights = model(X).detach(), snapshot(inner)
    optimizer.train()
    return model, inner, optimizer, outputs, weights


@pytest.mark.parametrize("name", BOTH)
def test_an_inner_module_is_evaluated_and_saved(name: str, tmp_path: Path) -> None:
    _, inner, optimizer, outputs, weights = around(name)
    inner.eval()
    assert torch.equal(inner(X), outputs), "only the inner one is in evaluation mode"
    inner.train()
    inner(X)
    assert optimizer.point.training
    assert same(dict(inner.state_dict()), weights)
    inner(X)
    inner.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh: Any = peft.PeftModel.from_pretrained(TwoLayers().double(), tmp_path)
    torch.testing.assert_close(fresh.double()(X), outputs, rtol=1e-10, atol=1e-12)
    inner(X)
    part = inner.base_model.model.second
    own = {key.removeprefix("base_model.model.second."): v for key, v in weights.items() if ".second." in key}
    assert same(dict(part.state_dict()), own), "and a part of it"


@pytest.mark.parametrize("name", BOTH)
def test_an_inner_layer_is_evaluated(name: str) -> None:
    model, optimizer = trained(name)
    part = model.base_model.model.first
    optimizer.eval()
    expected = part(X).detach()
    optimizer.train()
    part.eval()
    assert torch.equal(part(X), expected)


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("name", AWAY)
def test_a_frozen_mode_inside_of_training_is_no_evaluation(name: str, how: str) -> None:
    """As where dropout of a part is switched off: its gradients are those of training."""

    class Checkpointed(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            if how == "plain":
                return self.layer(x)
            return checkpoint(self.layer, x.requires_grad_(), use_reentrant=how == "reentrant")

    model: Any = adapted()
    inner = model.base_model.model
    inner.second = Checkpointed(inner.second)
    optimizer = make(name, model)
    inner.second.eval()
    for _ in range(4):
        plain_step(optimizer, model)
    optimizer.eval()
    found = {key.replace(".second.layer.", ".second."): value for key, value in snapshot(model).items()}
    assert same(found, reference(name, 4))


# -- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loads", ["model first", "optimizer first"])
@pytest.mark.parametrize("saves", ["model first", "optimizer first", "eval() before", "within a step"])
@pytest.mark.parametrize("name", list(METHODS))
def test_resuming_a_plain_loop(name: str, saves: str, loads: str) -> None:
    model, optimizer = trained(name)
    if saves == "within a step":
        problem(model)()
        model.zero_grad()
    if saves == "eval() before":
        optimizer.eval()
    if saves == "optimizer first":
        state, weights = copy.deepcopy(optimizer.state_dict()), snapshot(model)
    else:
        weights, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    twin = adapted(seed=5)
    for key, value in weights.items():  # what is frozen is the same
        if "base_layer" in key or "original_module" in key:
            twin.state_dict()[key].copy_(value)
    other = make(name, twin)
    plain_step(other, twin)  # it has been somewhere else
    if loads == "model first":
        twin.load_state_dict(weights)
        other.load_state_dict(state)
    else:
        other.load_state_dict(state)
        twin.load_state_dict(weights)
    assert same(snapshot(twin), weights)
    if saves == "eval() before":
        optimizer.train()
    for _ in range(3):
        plain_step(optimizer, model)
        plain_step(other, twin)
    assert same(snapshot(model), snapshot(twin))
    optimizer.eval()
    other.eval()
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("name", list(METHODS))
def test_resuming_with_accelerate(name: str, tmp_path: Path) -> None:
    def prepared(seed: int) -> tuple[Any, Any, Any]:
        model = adapted(seed=seed)
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, make(name, model))

    accelerator, model, optimizer = prepared(0)
    for _ in range(4):
        plain_step(optimizer.optimizer, model)
    accelerator.save_state(str(tmp_path))
    again, twin, other = prepared(5)
    again.load_state(str(tmp_path))
    for _ in range(3):
        plain_step(optimizer.optimizer, model)
        plain_step(other.optimizer, twin)
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("name", BOTH)
def test_a_second_saving_is_the_first(name: str) -> None:
    """Saving twice, and loading what was saved, changes nothing."""
    model, optimizer = trained(name)
    model.state_dict()
    first = optimizer.state_dict()
    second = optimizer.state_dict()
    assert first["flatbench"]["away"] == second["flatbench"]["away"]
    before = snapshot(model)
    optimizer.load_state_dict(first)
    assert same(snapshot(model), before)
