"""Memory that runs out: half the micro-batch, once, where the study allows it; else advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench import tasks
from flatbench.runs.finish import finish
from flatbench.store import claims, events, files
from tests.conftest import SMALL
from tests.test_runner import prepared

#: as torch says it
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …"
ERRORS = {
    "cpu": lambda: RuntimeError(CPU),
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "python": MemoryError,
}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have passes for gradients fail where more than so many examples are in them."""
    digits: Any = tasks.REGISTRY.load("digits")
    real = digits.loss

    def arm(limit: int, error: str) -> None:
        def loss(self: Any, model: Any, batch: Any) -> Any:
            if torch.is_grad_enabled() and len(batch["labels"]) > limit:
                raise ERRORS[error]()
            return real(self, model, batch)

        monkeypatch.setattr(digits, "loss", loss)

    return arm


@pytest.mark.parametrize("error", ERRORS)
def test_half_the_micro_batch_once(tmp_path: Path, fits: Any, error: str) -> None:
    train = {**SMALL["train"], "on_out_of_memory": "halve_micro_batch"}
    by_hand = prepared(tmp_path / "by_hand", "sam", train={**SMALL["train"], "micro_batch_size": 8})
    assert finish(by_hand.path) == "done"
    directory = prepared(tmp_path / "run", "sam", train=train)
    fits(8, error)
    assert finish(directory.path) == "done"
    result, expected = directory.result(), by_hand.result()
    assert result is not None
    assert expected is not None
    assert result["weights"] == expected["weights"]  # the batch is what it was
    assert result["training"]["micro_batch_size"] == 8
    environment = directory.environment()
    assert environment is not None
    assert environment["micro_batch_size"] == 8
    assert environment["memory_ran_out"]
    assert [e for e in events.read(directory.path) if e["event"] == "smaller micro-batch"]


def test_not_twice(tmp_path: Path, fits: Any) -> None:
    directory = prepared(tmp_path, train={**SMALL["train"], "on_out_of_memory": "halve_micro_batch"})
    fits(4, "gpu")
    assert finish(directory.path) == "failed"
    assert "lower train.micro_batch_size" in files.read_json(directory.path / "failure.json")["error"]


def test_not_unless_the_study_allows_it(tmp_path: Path, fits: Any) -> None:
    directory = prepared(tmp_path)
    fits(8, "cpu")
    assert finish(directory.path) == "failed"
    error = files.read_json(directory.path / "failure.json")["error"]
    assert error.startswith("out of memory (RuntimeError")
    assert "halve_micro_batch" in error
    assert "micro_batch_size" not in (directory.environment() or {})


@pytest.mark.parametrize("kills", [0, 1])
def test_a_process_killed_for_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int) -> None:
    """The kernel sends SIGKILL, of which only the container's count of such kills tells."""
    directory = prepared(tmp_path, train={**SMALL["train"], "on_out_of_memory": "halve_micro_batch"})
    monkeypatch.setattr(claims, "killed_for_memory", lambda: 3)
    claim = claims.take(directory.path)
    assert claim is not None
    claim._stop.set()
    monkeypatch.setattr(claims, "_runs", lambda _: False)  # it is dead, and left its claim
    monkeypatch.setattr(claims, "killed_for_memory", lambda: 3 + kills)
    assert finish(directory.path) == "done"
    assert (directory.environment() or {}).get("micro_batch_size") == (8 if kills else None)
    (taken,) = [e for e in events.read(directory.path) if e["event"] == "taken over"]
    assert taken["killed_for_memory"] == bool(kills)


def test_the_containers_count_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "memory.events"
    monkeypatch.setattr(claims, "_CONTAINER_MEMORY", file)
    assert claims.killed_for_memory() is None
    file.write_text("low 0\nhigh 0\nmax 12\noom 2\noom_kill 1\n")
    assert claims.killed_for_memory() == 1
