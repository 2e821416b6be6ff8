"""Shared by all tests: one thread, no network, a cache of the session's own, a small study."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flatbench.machine import forking

#: what processes of a group need besides, so that each fork of the session's server has it too
forking.PRELOAD += [
    "flatbench.distributed.shards",
    "deepspeed",
    "sklearn.datasets",
    "transformers.modeling_outputs",
]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

SMALL: dict[str, Any] = {
    "name": "small",
    "task": {"name": "digits", "train_size": 60, "validation_size": 50, "test_size": 100},
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "pretrain_epochs": 1},
    "adapter": {"r": 2, "alpha": 4},
    "methods": ["full_ft", "lora", "sam", "flat_lora", "eflat_lora"],
    "train": {"epochs": 3, "batch_size": 16, "lr": 1e-2, "log_every": 1, "threads": 1},
    "seeds": [0],
    "measures": ["cost"],
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretrained backbones are made once a session, and not taken from the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FLATBENCH_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_flushing() -> None:
    """No test cuts the power: waiting for the disk would only make them slow."""
    os.fsync = lambda handle: None


@pytest.fixture(scope="module", autouse=True)
def _start_afresh() -> None:
    """Trainings collect garbage: a second each where torch, transformers and all tests are looked through."""
    gc.collect()
    gc.freeze()
    if "accelerate.state" in sys.modules:  # a run in bf16 would leave its precision to the next file's
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


#: cases from which on `--thin` leaves some out
_MANY = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make check` makes do with a part of what is tested over and over."""
    parser.addoption(
        "--thin", type=int, default=1, help="of tests with many cases, take every so many-th alone"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that are slow from end to end come first: what is quick fills the workers' last seconds."""
    slow: dict[Path, list[bool]] = {}
    for item in items:
        slow.setdefault(item.path, []).append(item.get_closest_marker("slow") is not None)
    _leave_out_cases(config, items)
    items.sort(key=lambda item: -sum(slow[item.path]) / len(slow[item.path]))


def _leave_out_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests with many cases, keep every ``--thin``-th."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    thin = config.getoption("--thin")
    many = [own for own in cases.values() if len(own) >= _MANY]
    dropped = {item for own in many for place, item in enumerate(own) if place % thin}
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


_UNMARKED: list[str] = []


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: a test that is not marked `slow` or `long` starts no Python."""
    if _UNMARKED and event == "subprocess.Popen" and str(arguments[0]) == sys.executable:
        raise RuntimeError(f"{_UNMARKED[-1]} starts a process: mark it with pytest.mark.slow")


sys.addaudithook(_refuse)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """`make check` stays quick: see `_refuse`."""
    if not any(item.get_closest_marker(name) for name in ("slow", "long", "brief")):
        _UNMARKED.append(item.nodeid)
    try:
        return (yield)
    finally:
        _UNMARKED.clear()
