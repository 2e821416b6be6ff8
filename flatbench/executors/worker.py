"""Worker process of an executor: preparation, and finishing a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from flatbench.errors import FlatbenchError
from flatbench.machine import forking, stopping

#: what a worker enters once, and never leaves
_worker_contexts = contextlib.ExitStack()


def start_worker(environment: Mapping[str, str], devices: str | None) -> None:
    """Prepare a worker: its GPUs, what signals mean, and to end when its parent is gone, however it went."""
    forking.begin(environment)
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    _worker_contexts.enter_context(stopping.heeded(patient=True))


def load(also: Callable[[], object] | None = None) -> None:
    """Import what a run needs, which takes seconds, and call a function that imports more."""
    import flatbench.executors.preloaded  # noqa: F401

    if also is not None:
        with contextlib.suppress(FlatbenchError):  # who plans says what is wrong with a study
            also()


def finish(path: str, threads: int, jobs: int, lease: float) -> tuple[str, str | None]:
    """The run's state, and what stopped the worker if it was asked to stop, in the midst of a measure too."""
    from flatbench.runs.finish import finish

    try:
        return finish(Path(path), threads, jobs, lease), None
    except KeyboardInterrupt as stop:
        return "interrupted", str(stop)
