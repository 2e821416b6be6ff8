"""What every registered task must do; a new one is tested the moment it is listed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.models import factors, weights
from flatbench.models.adapt import adapt
from flatbench.tasks.base import Example, Task
from flatbench.training.trainer import fixed_batches
from tests.tasks.task_cases import CASES, Case

NAMES = tasks.REGISTRY.names()
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    if name in CASES:
        return CASES[name](tmp_path_factory.mktemp(name))
    # a task that brings its data needs no case; one that reads data or a pretrained model does
    load = tasks.REGISTRY.load(name)
    needed = [key for key, field in tasks.REGISTRY.options(name).model_fields.items() if field.is_required()]
    assert not needed, f"'{name}' needs {needed}: add a small case of it to tests/tasks/task_cases.py"
    return Case(load)


@pytest.fixture(scope="module")
def task(case: Case) -> Task:
    return case.task()


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return task.build_model(0).double().eval()


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def inputs(examples: Sequence[Example]) -> list[str]:
    """What the model is asked, without the answer."""
    return [
        json.dumps({key: plain(value) for key, value in e.items() if key != "labels"}, sort_keys=True)
        for e in (examples[i] for i in range(len(examples)))
    ]


def answers(examples: Sequence[Example]) -> list[Any]:
    return [plain(examples[i]["labels"]) for i in range(len(examples))]


def double(batch: Any) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


@pytest.mark.parametrize("name", NAMES)
def test_described_in_one_line(name: str) -> None:
    assert tasks.REGISTRY.describe(name).endswith(".")


def test_splits_are_disjoint_and_not_empty(task: Task) -> None:
    splits = task.splits(0)
    parts = [splits.train, splits.validation, splits.test, *splits.more_tests.values()]
    seen: set[str] = set()
    for part in parts:
        found = set(inputs(part))
        assert found
        assert not found & seen
        seen |= found


def test_splits_do_not_depend_on_the_run(case: Case) -> None:
    """Only training labels may differ between seeds (label noise)."""
    first, second = case.task().splits(0), case.task().splits(1)
    assert inputs(first.train) == inputs(second.train)
    for left, right in ((first.validation, second.validation), (first.test, second.test)):
        assert inputs(left) == inputs(right)
        assert answers(left) == answers(right)
    again = case.task().splits(1)
    assert answers(again.train) == answers(second.train)


def test_fingerprint_follows_the_data(case: Case) -> None:
    fingerprint = case.task().fingerprint()
    assert fingerprint == case.task().fingerprint()
    assert int(fingerprint, 16) >= 0
    if case.changed is None:
        pytest.skip("no other data to compare with; a case in tests/tasks/task_cases.py would have some")
    assert fingerprint != case.changed().fingerprint()


def test_models_are_decided_by_the_seed(case: Case) -> None:
    before = torch.get_rng_state()
    first, same, other = (case.task().build_model(seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    differ = not all(torch.equal(value, other[name]) for name, value in first.items())
    assert differ is bool(case.task().modules_to_save)  # nothing is new in a whole language model


def test_loss_does_not_depend_on_batching(task: Task, model: nn.Module) -> None:
    """The mean over batches, weighted by terms, is that of one batch: ragged batches and padding included."""
    examples = task.splits(0).train
    found = []
    with torch.no_grad():
        for size in (1, 4, 7, len(examples)):
            total, terms = 0.0, 0
            for batch in map(double, fixed_batches(task, examples, size, CPU)):
                assert all(len(value) == len(batch["labels"]) for value in batch.values())
                total += float(task.loss(model, batch)) * task.terms(batch)
                terms += task.terms(batch)
            found.append((total / terms, terms))
    assert all(terms == found[0][1] for _, terms in found)
    # language models compute their loss in float32 always, whose sums differ by a few of its roundings
    assert [loss for loss, _ in found] == pytest.approx([found[0][0]] * len(found), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate(task: Task, model: nn.Module, training: bool) -> None:
    model.train(training)
    examples = task.splits(0).test
    found = [
        task.evaluate(model, map(double, fixed_batches(task, examples, size, CPU)))
        for size in (3, len(examples))
    ]
    assert model.training is training
    assert {"loss", task.tuning_metric or task.metric, *task.validation_metrics} <= set(found[0])
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-6, nan_ok=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_the_main_metric_is_among_a_test_sets(task: Task, model: nn.Module) -> None:
    model.train()
    examples = task.splits(0).test
    found = task.evaluate(model, map(double, fixed_batches(task, examples, 8, CPU)))
    further = task.test_metrics(model, examples, 8)
    assert model.training
    assert task.metric in {**found, **further}
    assert not set(found) & set(further)
    for name, value in task.test_metrics(model, examples, 3).items():
        assert value == pytest.approx(further[name])
    model.eval()


def test_an_exception_in_evaluate_leaves_the_mode(task: Task, model: nn.Module) -> None:
    def broken() -> Any:
        raise KeyError
        yield

    model.train()
    with pytest.raises(KeyError):
        task.evaluate(model, broken())
    assert model.training
    model.eval()


def test_description_is_jsonable(task: Task) -> None:
    described = task.describe()
    assert json.loads(json.dumps(described, allow_nan=False)) == described


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_adapts_saves_and_loads(task: Task, tmp_path: Path, adapter: str) -> None:
    """Only the adapter and the task's new modules train; what is saved gives the same outputs again."""

    def adapted() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options = AdapterOptions(name=adapter, r=2, alpha=4)
            built = adapt(task.build_model(0), options, task.target_modules, task.modules_to_save)
        return built.eval()

    first = adapted()
    trained = factors.trainable_parameters(first)
    if adapter == "lora":
        assert factors.lora_factors(first)
        assert all("lora_" in name or any(m in name for m in task.modules_to_save) for name in trained)
    else:
        assert len(trained) == len(list(first.parameters()))
    for parameter in trained.values():
        parameter.data.add_(0.1)
    weights.save(first, tmp_path / "adapter")
    second = adapted()
    examples = task.splits(0).validation
    batch = next(iter(fixed_batches(task, examples, 8, CPU)))
    with torch.no_grad():
        assert not torch.equal(task.loss(first, batch), task.loss(second, batch))
        weights.load(second, tmp_path / "adapter")
        assert torch.equal(task.loss(first, batch), task.loss(second, batch))
