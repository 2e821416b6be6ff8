"""Cost is a summary of what the runner recorded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measure_cases import subject

from flatbench.errors import NotApplicableError
from flatbench.measures.cost import Cost, step_times


def test_summary() -> None:
    assert Cost()(subject("mlp_full")) == {
        "step_ms": pytest.approx(6.0),
        "step_ms_q1": pytest.approx(3.5),
        "step_ms_q3": pytest.approx(8.5),
        "steps_timed": 11,
        "warmup_steps": 5,
        "gradients_per_step": 2,
        "peak_memory_mb": 250.0,
        "peak_memory_source": "rss",
        "trainable_parameters": 123,
        "train_seconds": 4.5,
    }


@pytest.mark.parametrize(
    ("steps", "warmup"), [(0, 0), (1, 0), (2, 1), (8, 4), (10, 5), (40, 5), (51, 6), (1000, 100)]
)
def test_warmup(steps: int, warmup: int) -> None:
    found = step_times([9.0] * warmup + [0.002] * (steps - warmup))
    assert (found["warmup_steps"], found["steps_timed"]) == (warmup, steps - warmup)
    assert found["step_ms"] == (pytest.approx(2) if steps else None)


def test_what_was_not_recorded_is_none() -> None:
    found = Cost()(replace(subject("mlp_full"), training={"train_seconds": 2.0}))
    assert found["train_seconds"] == 2.0
    assert found["step_ms"] is found["peak_memory_mb"] is found["gradients_per_step"] is None


def test_a_checkpoint_from_elsewhere_has_no_cost() -> None:
    with pytest.raises(NotApplicableError, match="no training was recorded"):
        Cost()(replace(subject("mlp_full"), training={}))
