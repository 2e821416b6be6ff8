"""A step is made with the gradients that its closure takes, whatever the closure clears; or it is refused."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.errors import InputError
from tests.optim.models import adapted, problem, snapshot, trainable

TWO = ["sam", "asam", "gsam", "friendly_sam", "looksam", "flat_lora"]
ONE = ["eflat_lora", "bi_lora", "flat_lora_rwp", "msam", "plain", "obar", "swa", "lora_plus"]


def make(name: str, model: nn.Module) -> Any:
    known = optim.REGISTRY.options(name).model_fields
    given = {"rho": 0.5, "total_steps": 8, "ess": 100.0}
    options = {key: value for key, value in given.items() if key in known}
    # in SGD a gradient that is twice as long makes a step that is twice as long
    base = torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9)
    return optim.REGISTRY.load(name)(base, model, **options)


def keeping(model: nn.Module) -> Callable[[], Tensor]:
    """The problem's closure without its first line: it adds to the gradients that are there."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 20, generator=generator).double()
    y = torch.randint(0, 3, (32,), generator=generator)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in snapshot(model).values()])


def expected(name: str, steps: int = 3) -> Tensor:
    model = adapted()
    optimizer, closure = make(name, model), problem(model)
    for _ in range(steps):
        optimizer.step(closure)
    return weights(model)


@pytest.mark.parametrize("clear", ["never", "after", "before", "in place", "in place by the optimizer"])
@pytest.mark.parametrize("name", TWO + ONE)
def test_a_closure_that_clears_nothing(name: str, clear: str) -> None:
    model = adapted()
    optimizer, closure = make(name, model), keeping(model)
    for _ in range(3):
        if clear == "before":
            model.zero_grad()
        if clear == "in place":
            model.zero_grad(set_to_none=False)
        if clear == "in place by the optimizer":
            optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure)
        if clear == "after":
            optimizer.zero_grad()
    assert torch.equal(weights(model), expected(name))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", TWO + ONE)
def test_backward_before_a_closure_that_clears(name: str, set_to_none: bool) -> None:
    model = adapted()
    optimizer, plain = make(name, model), keeping(model)

    def closure() -> Tensor:
        model.zero_grad(set_to_none=set_to_none)
        return plain()

    for _ in range(3):
        plain()
        optimizer.step(closure)
    assert torch.equal(weights(model), expected(name))


@pytest.mark.parametrize("name", TWO + ONE)
def test_backward_before_a_closure_that_adds_is_refused(name: str) -> None:
    """As in other implementations of SAM, where `step(closure)` takes the second gradient alone."""
    model = adapted()
    optimizer, closure = make(name, model), keeping(model)
    before = weights(model)
    closure()
    with pytest.raises(InputError, match=r"no backward\(\) before step\(closure\)"):
        optimizer.step(closure)
    optimizer.eval()
    assert torch.equal(weights(model), before)
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(weights(model), expected(name)), "and it goes on from there"


@pytest.mark.parametrize("name", TWO)
def test_micro_batches_within_a_closure(name: str) -> None:
    model, twin = adapted(), adapted()
    optimizer, other = make(name, model), make(name, twin)
    parts = [keeping(model), keeping(model)]
    for _ in range(3):

        def both() -> Tensor:
            return parts[0]() + parts[1]()

        optimizer.step(both)

        def cleared() -> Tensor:
            twin.zero_grad()
            first, second = keeping(twin), keeping(twin)
            return first() + second()

        other.step(cleared)
    assert torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("name", TWO)
def test_a_parameter_that_only_the_first_pass_uses(name: str) -> None:
    """What a closure would have cleared is cleared: no gradient of the first pass makes the update."""
    model = adapted()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer, plain = make(name, model), keeping(model)
    optimizer.add_param_group({"params": [extra]})
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 1:
            extra.sum().backward()
        return plain()

    optimizer.step(closure)
    assert torch.equal(extra.detach(), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("name", TWO)
def test_the_parts_with_and_without_clearing(name: str, clears: bool) -> None:
    model = adapted()
    optimizer, plain = make(name, model), keeping(model)
    for _ in range(3):
        model.zero_grad()
        plain()
        if optimizer.perturb():
            if clears:
                optimizer.zero_grad()
            plain()
            optimizer.restore()
        optimizer.step()
    assert torch.equal(weights(model), expected(name))


def test_the_parts_without_a_second_pass_are_refused() -> None:
    model = adapted()
    optimizer = make("sam", model)
    before = weights(model)
    keeping(model)()
    assert optimizer.perturb()
    with pytest.raises(InputError, match="no gradient was taken between"):
        optimizer.restore()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("name", TWO)
def test_a_closure_without_backward_is_refused(name: str) -> None:
    model = adapted()
    optimizer, plain = make(name, model), keeping(model)
    loss = plain()
    with pytest.raises(InputError, match="took no gradient"):
        optimizer.step(lambda: loss)


@pytest.mark.parametrize("name", ONE)
def test_a_closure_without_backward_steps_with_the_gradients_that_are_there(name: str) -> None:
    model = adapted()
    optimizer, plain = make(name, model), keeping(model)
    for _ in range(3):
        optimizer.train()
        model.zero_grad()
        loss = plain()
        assert optimizer.step(lambda loss=loss: loss) is loss
    assert torch.equal(weights(model), expected(name))


def test_gradients_in_the_closure_of_clipping_and_scaling() -> None:
    """Clipping writes into the gradients; that clears nothing."""
    model = adapted()
    optimizer, plain = make("sam", model), keeping(model)

    def closure() -> Tensor:
        loss = plain()
        nn.utils.clip_grad_norm_(trainable(model), 1e-3)
        return loss

    plain()
    with pytest.raises(InputError, match="no backward"):
        optimizer.step(closure)


@pytest.mark.parametrize("name", ["sam", "flat_lora"])
def test_a_gradient_that_the_closure_clears_is_freed(name: str) -> None:
    """The step keeps no gradient alive beside the one that is being taken."""
    model = adapted()
    optimizer, plain = make(name, model), keeping(model)
    parameter = trainable(model)[1]
    earlier: list[Any] = []

    def closure() -> Tensor:
        model.zero_grad()
        assert all(reference() is None for reference in earlier)
        loss = plain()
        assert parameter.grad is not None
        earlier.append(weakref.ref(parameter.grad))
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(earlier) == 6
