"""Copies of models and optimizers, by deepcopy and pickle, between the steps of a training."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.models import adapted, snapshot
from tests.optim.test_points import BOTH, METHODS, Around, X, around, make, plain_step, same, trained


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", BOTH)
def test_a_copy_of_the_model_between_steps_is_at_the_point_of_evaluation(name: str, how: str) -> None:
    model, inner, _, outputs, weights = around(name)
    for of in (model, inner, inner.base_model.model):
        inner(X)  # in training mode
        made = duplicate(of, how)
        assert torch.equal(made.eval()(X), outputs)
        made.train()
        assert torch.equal(made(X), outputs), "it has no optimizer, and nothing moves it"
        prefix = "" if of is not inner.base_model.model else "base_model.model."
        own = snapshot(made if of is not model else made.model)
        assert same({prefix + key: value for key, value in own.items()}, weights)


def duplicate(thing: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(thing)
    if how == "pickle":
        return pickle.loads(pickle.dumps(thing))
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_module_that_holds_moved_parameters_itself(how: str) -> None:
    model = nn.Linear(20, 3).double()
    optimizer = make("msam", model)
    for _ in range(3):
        plain_step(optimizer, model)
    optimizer.eval()
    weight = model.weight.detach().clone()
    optimizer.train()
    assert not torch.equal(model.weight, weight)
    assert torch.equal(duplicate(model, how).weight, weight)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_copy_of_model_and_optimizer(name: str, mode: str, how: str, order: str) -> None:
    """It goes on as the original does, bit by bit, follows its own model, and leaves the original alone."""
    model, optimizer = trained(name)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    getattr(optimizer, mode)()
    if order == "model first":
        twin, other, _ = duplicate((model, optimizer, scheduler), how)
    else:
        other, twin, _ = duplicate((optimizer, model, scheduler), how)
    assert other.model is twin
    optimizer.train()
    other.train()
    for _ in range(3):
        plain_step(optimizer, model)
        plain_step(other, twin)
    after = snapshot(model)
    assert same(snapshot(twin), after)
    twin(X)
    plain_step(other, twin)
    assert same(snapshot(model), after), "a step of the copy does not step the original"
    twin(X)
    twin.eval()
    outputs = twin(X).detach()
    twin.train()
    twin(X)
    other.eval()
    assert torch.equal(twin(X), outputs), "the copy's model finds the copy's points"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", list(METHODS))
def test_a_copy_of_a_state(name: str, mode: str) -> None:
    _, optimizer = trained(name)
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    assert not any(v.requires_grad for v in state["flatbench"].get("base_point", ()))


def test_an_optimizer_inside_of_its_module() -> None:
    """A module that keeps its optimizer is copied with it."""
    model: Any = Around(adapted())
    model.optimizer = make("eflat_lora", model)
    for _ in range(3):
        plain_step(model.optimizer, model)
    for how in ("deepcopy", "pickle"):
        twin = duplicate(model, how)
        assert twin.optimizer.model is twin
        weights = snapshot(model)
        plain_step(twin.optimizer, twin)
        assert same(snapshot(model), weights)
