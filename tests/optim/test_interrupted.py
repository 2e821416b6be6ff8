"""A step that fails in the middle leaves nothing behind: what is trained next is what it would have been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from tests.optim.models import adapted, problem, snapshot, trainable
from tests.optim.trainer_case import ACCUMULATION, Trainer, adapter_in, model_of, schedule, trainer_of

NAMES = optim.REGISTRY.names()


class OutOfMemory(BaseException):
    """As Ctrl-C, no Exception."""


def make(name: str, model: nn.Module) -> Any:
    known = optim.REGISTRY.options(name).model_fields
    given = {"rho": 0.5, "total_steps": 8, "ess": 100.0}
    options = {key: value for key, value in given.items() if key in known}
    return optim.REGISTRY.load(name)(torch.optim.AdamW(trainable(model), lr=1e-2), model, **options)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def failing(closure: Callable[[], Any], at: int, after: bool) -> Callable[[], Any]:
    """Raise in the call ``at``, before or after its gradients are taken."""
    calls: list[int] = []

    def called() -> Any:
        calls.append(1)
        if len(calls) == at and not after:
            raise OutOfMemory
        loss = closure()
        if len(calls) == at:
            raise OutOfMemory
        return loss

    return called


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_closure_that_fails(name: str, at: int, after: bool) -> None:
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer, other = make(name, model), make(name, twin)
    if at > other.gradients_of_next_step:
        pytest.skip("takes one gradient")
    for step in range(3):
        other.step(problem(twin))
        if step == (0 if name == "looksam" else 1):
            with pytest.raises(OutOfMemory):
                optimizer.step(failing(problem(model), at, after))
        optimizer.step(problem(model))
    assert same(snapshot(model), snapshot(twin))
    assert int(optimizer.skipped_perturbations) == int(other.skipped_perturbations)
    assert optimizer.steps == other.steps


@pytest.mark.parametrize("how", ["closure", "plain loop"])
@pytest.mark.parametrize("name", NAMES)
def test_an_update_that_fails(name: str, how: str) -> None:
    """For instance in a hook that clips, or where the base optimizer makes its state."""
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer, other = make(name, model), make(name, twin)
    fails: list[int] = []

    def fail(*_: Any) -> None:
        if fails:
            fails.clear()
            raise OutOfMemory

    optimizer.base.register_step_pre_hook(fail)

    def step(made: Any, of: nn.Module) -> None:
        closure = problem(of)
        if how == "closure":
            made.step(closure)
            return
        closure()
        if hasattr(made, "perturb") and made.perturb():
            closure()
            made.restore()
        made.step()

    for index in range(4):
        if index == 2:
            fails.append(1)
            with pytest.raises(OutOfMemory):
                step(optimizer, model)
        step(optimizer, model)
        step(other, twin)
    assert same(snapshot(model), snapshot(twin))


def test_gradients_of_the_second_adapter_are_cleared_with_the_models() -> None:
    """A backward pass that fails, and a script that clears by `model.zero_grad()`."""
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer, other = make("bi_lora", model), make("bi_lora", twin)
    for step in range(3):
        problem(twin)()
        other.step()
        if step == 1:
            problem(model, seed=7)()  # its batch is given up
        problem(model)()
        optimizer.step()
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("name", ["sam", "friendly_sam", "flat_lora"])
def test_parts_that_are_interrupted(name: str) -> None:
    model, twin = adapted(dtype=torch.float32), adapted(dtype=torch.float32)
    optimizer, other = make(name, model), make(name, twin)
    other.step(problem(twin))
    before = snapshot(model)
    problem(model)()
    assert optimizer.perturb()
    optimizer.eval()  # the script failed here, and evaluates
    assert same(snapshot(model), before)
    problem(model)()
    assert optimizer.perturb()
    optimizer.step(problem(model))
    assert same(snapshot(model), snapshot(twin))


def test_a_step_that_was_ready_does_not_stand_for_the_next() -> None:
    model = adapted()
    optimizer = make("sam", model)
    problem(model)()
    assert optimizer.perturb()
    problem(model)()
    optimizer.restore()  # clipping fails here
    optimizer.zero_grad()
    problem(model)()
    with pytest.raises(ValueError, match="two gradients a step"):
        optimizer.step()


def fresh(trainer: Trainer) -> None:
    """The same weights, optimizer and schedule as at the start."""
    twin = trainer_of("sam", Path(trainer.args.output_dir), model_of())
    trainer.model.load_state_dict(twin.model.state_dict())
    method = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    method.load_state_dict(twin.optimizer.state_dict())
    trainer.optimizer, trainer.lr_scheduler = method, schedule(method)


@pytest.mark.parametrize("at", [2, ACCUMULATION + 3, 2 * ACCUMULATION + 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_fails_leaves_no_micro_batches(
    at: int, error: type[BaseException], tmp_path: Path
) -> None:
    whole = trainer_of("sam", tmp_path, model_of())
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    trainer = trainer_of("sam", tmp_path, model_of())
    passes: list[int] = []
    own = trainer.compute_loss

    def fail(*arguments: Any, **options: Any) -> Any:
        passes.append(1)
        if len(passes) == at:
            raise error
        return own(*arguments, **options)

    trainer.compute_loss = fail  # type: ignore[method-assign]
    with pytest.raises(error):
        trainer.train()
    fresh(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "again"))
    assert same(adapter_in(tmp_path / "again"), adapter_in(tmp_path / "whole"))


def test_between_two_micro_batches(tmp_path: Path) -> None:
    """As Ctrl-C while data are loaded: no pass is under way."""
    whole = trainer_of("sam", tmp_path, model_of())
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    trainer = trainer_of("sam", tmp_path, model_of())
    rows, data = [0], trainer.data_collator

    def collate(features: Any) -> Any:
        rows[0] += 1
        if rows[0] == 4:
            raise KeyboardInterrupt
        return data(features)

    trainer.data_collator = collate
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    fresh(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "again"))
    assert same(adapter_in(tmp_path / "again"), adapter_in(tmp_path / "whole"))


def test_auto_find_batch_size(tmp_path: Path) -> None:
    """What transformers does: the training is begun again, within `train`, with half the batch."""
    start = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer = trainer_of("sam", tmp_path, model_of(), auto_find_batch_size=True, **start)
    own, passes = trainer.compute_loss, [0]

    def fail(model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        passes[0] += 1
        if len(inputs["labels"]) == 8 and passes[0] == 2:
            raise RuntimeError("CUDA out of memory.")
        return own(model, inputs, *arguments, **options)

    trainer.compute_loss = fail  # type: ignore[method-assign]
    trainer.train()
    size = trainer._train_batch_size
    assert size < 8
    trainer.save_model(str(tmp_path / "again"))
    whole = trainer_of(
        "sam",
        tmp_path,
        model_of(),
        **{**start, "per_device_train_batch_size": size, "auto_find_batch_size": False},
    )
    whole.train()
    whole.save_model(str(tmp_path / "whole"))
    assert same(adapter_in(tmp_path / "again"), adapter_in(tmp_path / "whole"))
