"""The budget of a watched training holds, whatever a measure costs, and is shared by its measures."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flatbench.callbacks import SharpnessWatch
from flatbench.callbacks.budget import Budget, OverBudget
from flatbench.callbacks.record import FILE, Record
from tests.callbacks_cases import ROWS
from tests.optim.trainer_case import model_of, optimizer_of


@dataclass
class Clock:
    """Seconds that pass where a test says so."""

    now: float = 100.0
    per_loss: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def criterion(self, outputs: Any, targets: Tensor) -> Tensor:
        self.now += self.per_loss
        return torch.nn.functional.cross_entropy(outputs["logits"].float(), targets)


def watched_for(clock: Clock, budget: float | None, steps: int, measures: Any) -> SharpnessWatch:
    """A training whose steps take ten seconds each, with a measurement due at each fifth."""
    model = model_of()
    optimizer = optimizer_of("eflat_lora", model)
    watch = SharpnessWatch(
        model,
        optimizer,
        measures=measures,
        data=ROWS,
        every=5,
        budget=budget,
        loss=clock.criterion,
        clock=clock,
    )
    watch.begin()
    for step in range(1, steps + 1):
        clock.now += 10.0
        watch.after_step(step)
    return watch


@pytest.mark.parametrize("per_loss", [0.01, 0.2, 30.0])
def test_the_budget_holds(per_loss: float, caplog: pytest.LogCaptureFixture) -> None:
    """600 seconds of training; a measurement of about twenty losses costs from 0.2 s to ten minutes."""
    clock = Clock()
    clock.per_loss = per_loss
    watch = watched_for(clock, 0.05, 60, ["critical_sharpness", {"name": "sam_sharpness", "steps": 3}])
    trained, spent = watch.budget.trained, watch.budget.spent
    assert trained == pytest.approx(600)
    # one evaluation of a loss cannot be broken off
    assert spent <= 0.05 * trained + per_loss
    if per_loss <= 1.0:
        assert spent <= 0.05 * trained * 1.1
        assert watch._counts["critical_sharpness_merged"] > 0
    table = watch.record.frame()
    due = [*range(5, 61, 5)]
    assert set(table["step"]) <= set(due)  # a row where something was begun, which tells of those without one
    assert [s - 5 * (p + 1) for s, p in zip(table["step"], table["passed_over"], strict=True)] == [
        0,
        *table["step"][:-1],
    ]
    out = [c for c in table if c.endswith(".left_out")]
    left, taken = sum(watch._left_out.values()), sum(watch._counts.values())
    told = sum(int(table[c].notna().sum()) for c in out)
    assert told + 2 * (len(due) - len(table)) == left
    assert taken + left == 2 * len(due)
    assert (left == 0) == (per_loss == 0.01)
    with caplog.at_level(logging.INFO):
        watch.end()
    assert ("left out for the budget" in caplog.text) == (left > 0)
    assert "budget 5.0%" in caplog.text


def test_a_cheap_and_an_expensive_measure_share_the_time() -> None:
    """The cheap one is not starved by attempts at the expensive one, nor that by the cheap one."""
    clock, costs = Clock(), {"cheap": 2, "expensive": 200}
    budget, taken = Budget(0.05, clock, costs), dict.fromkeys(costs, 0)
    for _ in range(5000):  # 50,000 seconds of training, 2,500 of them for measures
        clock.now += 10
        for label, losses in costs.items():
            if not budget.affords(label):
                continue
            with contextlib.suppress(OverBudget), budget.spending(label) as limited:
                loss = limited(lambda model, batch: (torch.zeros(()), 1))
                for _ in range(losses):
                    clock.now += 1
                    loss(torch.nn.Identity(), {})
                taken[label] += 1
    assert 0.9 * 2500 <= budget.spent <= 1.01 * 2500
    assert taken["expensive"] in (4, 5, 6)  # half of the time, less what failed attempts took
    assert taken["cheap"] > 500


def test_the_record_is_paid_from_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes of a real training had taken four times their budget, in writing thousands of rows."""
    clock = Clock()
    clock.per_loss = 0.01
    add = Record.add

    def slow(self: Record, row: Any) -> None:
        clock.now += 0.01 * len(self.rows)
        add(self, row)

    monkeypatch.setattr(Record, "add", slow)
    start = clock.now
    watch = watched_for(clock, 0.002, 1000, ["balancedness"])
    measured = clock.now - start - 10.0 * 1000
    assert watch.budget.spent == pytest.approx(measured, abs=0.2)  # losses were taken before it began
    assert 0 < measured <= 0.002 * 10.0 * 1000 * 1.1
    assert len(watch.rows) < 200


def test_no_budget_leaves_nothing_out() -> None:
    clock = Clock()
    clock.per_loss = 5.0
    watch = watched_for(clock, None, 10, ["critical_sharpness"])
    assert watch._counts == {"critical_sharpness_merged": 2}
    assert "no limit" in watch.summary()


def test_times_go_on_after_an_interruption(tmp_path: Path) -> None:
    clock = Clock()
    budget = Budget(0.1, clock)
    clock.now += 50
    with budget.spending("a"):
        clock.now += 4
    assert budget.trained == 50
    assert budget.affords("a") is False
    assert budget.affords("b")
    record = Record(tmp_path / FILE)
    record.add({"step": 7, **budget.state()})
    later = Budget(0.1, clock)
    clock.now += 1000  # the time between the two is nobody's
    last = Record(tmp_path / FILE).begin(9) or {}
    later.resume(last["train_seconds"], last["measure_seconds"])
    assert (later.trained, later.spent) == (50, 4)


def test_a_measure_that_was_broken_off_waits_for_twice_its_cost() -> None:
    clock = Clock()
    budget = Budget(0.1, clock)
    clock.now += 100

    def attempt() -> None:
        with budget.spending("a") as limited:
            loss = limited(lambda model, batch: (torch.zeros(()), 1))
            for _ in range(100):
                clock.now += 1
                loss(torch.nn.Identity(), {})

    with pytest.raises(OverBudget):
        attempt()
    assert budget.spent == 11
    clock.now += 200
    assert not budget.affords("a")
    clock.now += 50
    assert budget.affords("a")
