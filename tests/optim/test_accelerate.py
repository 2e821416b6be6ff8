"""accelerate's accumulation with every method: the plain loop's steps, or a refusal that says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from flatbench import optim
from flatbench.errors import InputError
from tests.optim.models import snapshot
from tests.optim.trainer_case import EXAMPLES, MICRO, data, model_of, optimizer_of

NAMES = optim.REGISTRY.names()
TWO = [name for name in NAMES if hasattr(optim.REGISTRY.load(name), "perturb")]
ONE = [name for name in NAMES if name not in TWO]
MANY = 4
BATCHES = EXAMPLES // MICRO


@pytest.fixture(autouse=True)
def _no_state_left() -> Any:
    """accelerate keeps what it was told for the whole process, by tests of other files too."""
    states = (AcceleratorState, PartialState, GradientState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


def loader() -> Any:
    return torch.utils.data.DataLoader(data(), batch_size=MICRO, generator=torch.Generator())


def plain(name: str, accumulate: int) -> dict[str, Tensor]:
    model = model_of()
    optimizer, batches = optimizer_of(name, model), list(loader())
    for start in range(0, len(batches), accumulate):
        parts = batches[start : start + accumulate]

        def closure(parts: Any = parts) -> Tensor:
            optimizer.zero_grad()
            for part in parts:
                loss = model(**part)["loss"] / accumulate
                loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.eval()
    return snapshot(model)


def prepared(name: str, accumulate: int) -> tuple[Any, Any, Any, Any]:
    model = model_of()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    return accelerator, *accelerator.prepare(model, optimizer_of(name, model), loader())


def near(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, MANY])
@pytest.mark.parametrize("name", ONE)
def test_one_gradient_methods_accumulate(name: str, accumulate: int) -> None:
    accelerator, model, optimizer, batches = prepared(name, accumulate)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
    optimizer.eval()
    near(snapshot(model), plain(name, accumulate))


@pytest.mark.parametrize("name", TWO)
def test_the_parts_accumulate(name: str) -> None:
    """As the documentation shows it: the micro-batches of a step are kept, and run again."""
    accelerator, model, optimizer, batches = prepared(name, MANY)
    method, parts = optimizer.optimizer, []
    for batch in batches:
        with accelerator.accumulate(model):
            parts.append(batch)
            accelerator.backward(model(**batch)["loss"])
            if accelerator.sync_gradients:
                if method.perturb():
                    method.zero_grad()
                    for part in parts:
                        accelerator.backward(model(**part)["loss"])
                    method.restore()
                parts = []
            optimizer.step()
            optimizer.zero_grad()
    near(snapshot(model), plain(name, MANY))


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_over_all_micro_batches(name: str) -> None:
    accelerator, model, optimizer, batches = prepared(name, MANY)
    kept = list(batches)
    for start in range(0, BATCHES, MANY):

        def closure(start: int = start) -> Tensor:
            optimizer.zero_grad()
            for part in kept[start : start + MANY]:
                loss = model(**part)["loss"]
                accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    optimizer.eval()
    near(snapshot(model), plain(name, MANY))


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("name", ["sam", "flat_lora", "eflat_lora", "plain"])
def test_a_closure_within_accumulate_is_refused(name: str, clears: bool) -> None:
    """accelerate does not call it for the first micro-batches: the step would be that of the last one."""
    accelerator, model, optimizer, batches = prepared(name, MANY)

    def loop() -> None:
        for batch in batches:
            with accelerator.accumulate(model):

                def closure(batch: Any = batch) -> Tensor:
                    if clears:
                        optimizer.zero_grad()
                    loss = model(**batch)["loss"]
                    accelerator.backward(loss)
                    return loss

                optimizer.step(closure)

    with pytest.raises(InputError, match="call step"):
        loop()


def test_settings_of_an_earlier_accelerator_refuse_nothing() -> None:
    prepared("sam", MANY)
    model = model_of()
    optimizer = optimizer_of("sam", model)
    batch = next(iter(loader()))

    def closure() -> Tensor:
        loss = model(**batch)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.steps == 1
