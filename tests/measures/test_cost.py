"""Cost is a summary of what the runner recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from flatbench.errors import InputError, NotApplicableError
from flatbench.measures.cost import Cost, flops_per_example, step_times
from tests.measures.measure_cases import subject


def test_summary() -> None:
    found = Cost()(subject("mlp_full"))
    assert found.pop("gflops_per_example") > 0
    assert found == {
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
        "clock": "wall clock",
        "device": "some processor",
        "threads": 1,
        "jobs": 2,
        "energy_joules": 31.5,
        "energy_source": "rapl packages, whole machine",
        "energy_missing": None,
        "core_wait_share": 0.01,
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


def test_pairs_are_asked_of_the_run_alone() -> None:
    given = subject("mlp_full")
    assert "paired_ratio" not in Cost()(given)
    found = Cost(paired=True, pairs=7)(replace(given, pair=lambda pairs: {"paired_ratio": 2.0 * pairs}))
    assert (found["paired_ratio"], found["train_seconds"]) == (14.0, 4.5)
    assert "own directories" in Cost(paired=True)(given)["paired_missing"]


def test_pairs_without_pairing_are_refused() -> None:
    with pytest.raises(InputError, match="paired"):
        Cost(pairs=5)


def test_operations_are_those_of_the_matrix_products() -> None:
    """Two linear layers of n·m weights: 2nm forward, 2nm for the weights' gradient, 2nm for the input's."""
    first, second = torch.nn.Linear(7, 5, bias=False), torch.nn.Linear(5, 3, bias=False)
    model = torch.nn.Sequential(first, second)

    def loss(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        return model(batch["x"]).square().mean(), len(batch["x"])

    given = replace(subject("mlp_full"), model=model, batches=[{"x": torch.randn(4, 7)}] * 2, loss=loss)
    assert flops_per_example(given) == 2 * (7 * 5) * 2 + 2 * (5 * 3) * 3  # no gradient for the input
    first.weight.requires_grad_(False)
    assert flops_per_example(given) == 2 * (7 * 5) + 2 * (5 * 3) * 2
    assert Cost()(given)["gflops_per_example"] == pytest.approx(2 * 130e-9)  # two gradients a step


def test_attention_is_counted() -> None:
    """q·kᵀ and its product with v cost 2·T²·d each and twice that backwards, beside the linear layers."""
    given = subject("vit_full")
    hidden, tokens = 6, 5
    linear = sum(m.weight.numel() for m in given.model.modules() if isinstance(m, torch.nn.Linear))
    assert flops_per_example(given) > 3 * 2 * 2 * tokens**2 * hidden
    assert flops_per_example(given) > 6 * linear
