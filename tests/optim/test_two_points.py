"""One-gradient methods are found at their unperturbed point by everything that uses the model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.optim.base.two_points import TwoPoints
from tests.optim.models import TwoLayers, adapted, problem, snapshot, trainable

METHODS = {name: optim.REGISTRY.load(name) for name in optim.REGISTRY.names()}
#: not those whose other point is the one that is evaluated: see test_averaging.py
NAMES = [name for name, kind in METHODS.items() if issubclass(kind, TwoPoints) and kind.away_when_training]
X = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(name: str, model: nn.Module) -> Any:
    known = optim.REGISTRY.options(name).model_fields
    given = {"rho": 0.5, "total_steps": 8, "ess": 100.0}
    options = {key: value for key, value in given.items() if key in known}
    return optim.REGISTRY.load(name)(torch.optim.AdamW(trainable(model), lr=1e-2), model, **options)


def trained(name: str, steps: int = 4) -> tuple[Any, Any, dict[str, Tensor], Tensor]:
    """Model and optimizer between two steps; the unperturbed weights and what the model computes there."""
    model = adapted()
    optimizer = make(name, model)
    for _ in range(steps):
        optimizer.step(problem(model))
    optimizer.eval()
    weights, outputs = snapshot(model), model(X).detach()
    optimizer.train()
    return model, optimizer, weights, outputs


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_training_is_at_another_point(name: str) -> None:
    model, _, _, outputs = trained(name)
    assert not torch.equal(model(X), outputs)


def test_a_forward_pass_in_evaluation_mode(name: str) -> None:
    model, _, _, outputs = trained(name)
    there = model(X).detach()
    model.eval()
    assert torch.equal(model(X), outputs)
    assert torch.equal(model.base_model.model(X), outputs), (
        "also without peft's shell, as generation calls it"
    )
    model.train()
    assert torch.equal(model(X), there)


def test_saving_without_asking(name: str, tmp_path: Path) -> None:
    model, _, _, outputs = trained(name)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    fresh: Any = peft.PeftModel.from_pretrained(TwoLayers().double(), tmp_path)
    torch.testing.assert_close(fresh.double()(X), outputs, rtol=1e-10, atol=1e-12)
    model, _, weights, _ = trained(name)
    assert same(model.state_dict(), weights)


def test_saving_does_not_disturb_a_loop_that_calls_nothing(name: str) -> None:
    model, optimizer, *_ = trained(name)
    twin, other, *_ = trained(name)
    for _ in range(3):
        model.state_dict()
        problem(model)()
        optimizer.step()
        problem(twin)()
        other.step()
    assert same(snapshot(model), snapshot(twin))


def test_what_is_loaded_into_the_model_stays(name: str) -> None:
    model, optimizer, *_ = trained(name)
    loaded = {key: torch.full_like(value, 0.25) for key, value in snapshot(adapted()).items()}
    model.load_state_dict(loaded)
    optimizer.eval()
    assert same(snapshot(model), loaded)


def test_the_optimizer_outlives_its_training_function(name: str) -> None:
    def train() -> tuple[Any, dict[str, Tensor]]:
        model, _, weights, _ = trained(name)
        return model, weights

    model, weights = train()
    assert same(snapshot(model), weights)


def test_a_second_optimizer_takes_over(name: str) -> None:
    model, first, weights, _ = trained(name)
    second = make(name, model)
    assert same(snapshot(model), weights)
    for _ in range(2):
        second.step(problem(model))
    second.eval()
    after = snapshot(model)
    first.eval()
    assert same(snapshot(model), after)
    assert sum("Follower" in repr(hook) for hook in model.get_base_model()._forward_pre_hooks.values()) == 1


def test_copies_have_no_optimizer(name: str) -> None:
    model, optimizer, weights, outputs = trained(name)
    optimizer.eval()
    for lone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer.train()
        assert torch.equal(lone.eval()(X), outputs)
        assert optimizer.away, "the copy does not move the original"
        optimizer.eval()
        assert same(snapshot(lone), weights)


def test_a_wrapped_model_is_followed_inside(name: str) -> None:
    model = adapted()
    optimizer = make(name, nn.DataParallel(model))
    for _ in range(4):
        optimizer.step(problem(model))
    optimizer.eval()
    weights = snapshot(model)
    optimizer.train()
    assert same(model.state_dict(), weights), "the wrapped model is what is saved"


def test_merging_after_eval(name: str) -> None:
    model, optimizer, _, outputs = trained(name)
    optimizer.eval()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(X).detach(), outputs)
