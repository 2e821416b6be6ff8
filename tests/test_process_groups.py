"""Several processes train every method to the adapter that one process reaches on the joint batch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flatbench import store
from flatbench.distributed import processes as distributed
from flatbench.errors import InputError
from flatbench.models import weights as model_weights
from flatbench.models.factors import trainable_parameters
from flatbench.runs import finish as runner
from flatbench.store import training_state
from flatbench.training.trainer import Trainer
from tests import process_cases as cases

pytestmark = pytest.mark.slow


# of three processes parts are unequal and one is empty; two show nothing that they do not
@pytest.fixture(scope="module", params=[3, pytest.param(2, marks=pytest.mark.long)])
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """What a group of real processes over gloo has trained."""
    folder = tmp_path_factory.mktemp(f"group{request.param}")
    distributed.launch(cases.everything, folder, request.param)
    return folder, request.param


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


@pytest.mark.parametrize(
    ("name", "base", "micro"), [(name, *how) for name in cases.METHODS for how in cases.whole(name)]
)
def test_a_group_is_one_process_on_the_joint_batch(
    group: tuple[Path, int], name: str, base: str, micro: int | None
) -> None:
    folder, size = group
    alone = cases.alone(name, base)
    found = [training_state.load(folder / f"{name}-{base}-{micro}-{rank}") for rank in range(size)]
    assert distance(found[0]["parameters"], alone["parameters"]) <= 1e-6
    for other in found[1:]:
        assert distance(other["parameters"], found[0]["parameters"]) == 0, "all hold the same weights"
    for row, expected in zip(found[0]["history"], alone["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-6, nan_ok=True)


def step_of_sam(rho: float, size: int) -> dict[str, Tensor]:
    """m-sharpness written out: every part of a batch is perturbed by its own gradient, and the sum steps."""
    trainer = cases.trainer_of("plain", "sgd")
    task, model = trainer.task, trainer.bare
    parameters = trainable_parameters(model)
    step = 0
    for epoch in range(cases.EPOCHS):
        trainer.sampler.epoch, trainer.sampler.skip = epoch, 0
        for indices in trainer.sampler:
            whole = task.collate([trainer.splits.train[i] for i in indices])
            total = {name: torch.zeros_like(p) for name, p in parameters.items()}
            for rank in range(size):
                rows = indices[rank::size]
                if not rows:
                    continue
                part = task.collate([trainer.splits.train[i] for i in rows])
                first = gradient(task, model, parameters, part)
                length = torch.sqrt(sum((g.square().sum() for g in first.values()), torch.zeros(())))
                copies = {name: p.detach().clone() for name, p in parameters.items()}
                with torch.no_grad():
                    for name, p in parameters.items():
                        p.add_(first[name] * (rho / length))
                second = gradient(task, model, parameters, part)
                with torch.no_grad():
                    for name, p in parameters.items():
                        p.copy_(copies[name])
                        total[name] += second[name] * (task.terms(part) / task.terms(whole))
            length = torch.sqrt(sum((g.square().sum() for g in total.values()), torch.zeros(())))
            shrink = min(1.0, 0.5 / (float(length) + 1e-6))
            with torch.no_grad():
                for name, p in parameters.items():
                    p.sub_(total[name] * shrink * 1e-2 * (1 - step / cases.STEPS))
            step += 1
    return {name: p.detach().clone() for name, p in parameters.items()}


def gradient(task: Any, model: Any, parameters: dict[str, Any], part: Any) -> dict[str, Tensor]:
    grads = torch.autograd.grad(task.loss(model, part), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("name", cases.PER_PROCESS)
def test_m_sharpness(group: tuple[Path, int], name: str) -> None:
    folder, size = group
    found = [training_state.load(folder / f"{name}-m_sharpness-{rank}")["parameters"] for rank in range(size)]
    for other in found[1:]:
        assert distance(other, found[0]) == 0, "all hold the same weights"
    joint = training_state.load(folder / f"{name}-sgd-None-0")["parameters"]
    assert distance(found[0], joint) > 1e-6, "m-sharpness is another method"
    if name == "sam":
        assert distance(found[0], step_of_sam(0.05, size)) <= 1e-9


def test_m_sharpness_of_one_process_is_refused() -> None:
    with pytest.raises(InputError, match="this run has one process"):
        cases.trainer_of("sam", m_sharpness=True)


def test_a_method_with_a_memory_has_no_m_sharpness() -> None:
    from flatbench import optim

    for name in ("friendly_sam", "looksam", "eflat_lora", "plain"):
        assert "m_sharpness" not in optim.REGISTRY.options(name).model_fields


def failing(_: Path) -> None:
    raise InputError("no such thing")


def test_what_fails_in_a_process_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such thing"):
        distributed.launch(failing, tmp_path, 2)


def test_a_whole_run_and_one_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = cases.prepared(tmp_path / "alone", "eflat_lora", 1)
    two = cases.prepared(tmp_path / "two", "eflat_lora", 2)
    assert alone.id != two.id
    assert runner.finish(alone.path) == "done"
    assert runner.finish(two.path) == "done"  # by processes that start as a user's do
    results = [d.result() or {} for d in (two, alone)]
    for split, values in results[1]["metrics"].items():
        assert results[0]["metrics"][split] == pytest.approx(values, rel=1e-5)
    weights = [load_file(model_weights.weights_file(d.adapter)) for d in (two, alone)]
    assert distance(*weights) <= 1e-6
    history = [store.history_of(d).drop(columns="step_seconds") for d in (two, alone)]
    pd.testing.assert_frame_equal(*history, rtol=1e-4)
    names = [sorted(p.name for p in d.path.rglob("*") if p.is_file()) for d in (two, alone)]
    assert names[0] == names[1]

    # as if both processes had been killed after the second epoch
    cut = cases.prepared(tmp_path / "cut", "eflat_lora", 2)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.finish(cut.path)
    assert cut.state() == "interrupted"
    assert runner.finish(cut.path) == "done"
    assert distance(load_file(model_weights.weights_file(cut.adapter)), weights[0]) == 0
    events = (cut.path / "events.jsonl").read_text()
    assert '"resumed"' in events


real_launch = distributed.launch


def interrupted(work: Any, path: Path, processes: int, check: Any) -> None:
    def stop() -> None:
        check()
        if len(list(path.glob("state*.safetensors"))) == 2:
            raise KeyboardInterrupt

    real_launch(slowly, path, processes, stop)


def slowly(path: Path) -> None:
    """Wait after the second epoch, to be interrupted there."""
    train_epoch = Trainer._train_epoch

    def wait(self: Trainer, after_step: Any) -> None:
        if self.epoch == 2:
            threading.Event().wait(600)  # in vain: the process is killed
        train_epoch(self, after_step)

    Trainer._train_epoch = wait  # type: ignore[method-assign]
    runner._train_together(path)
