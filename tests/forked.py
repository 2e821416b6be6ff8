"""Groups of processes that are copies of one which has loaded torch: a fresh interpreter costs seconds."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from flatbench.distributed import processes as distributed

#: what the first process loads: what a run of several processes needs. accelerate loads DeepSpeed itself
LOADED = [
    "flatbench.runs.finish",
    "flatbench.distributed.shards",
    "deepspeed",
    "sklearn.datasets",
    "transformers.modeling_outputs",
]


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Within it, `distributed.launch` forks its processes from one that is idle, instead of starting Python.

    They get the environment as it was at the first of all launches of this session. Everything else is as it
    is with fresh ones, which `test_process_groups` starts for a whole run.
    """
    if torch.cuda.is_available():  # which does not outlive a fork
        yield
        return
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(LOADED)
    start = distributed.start_processes

    def fork(work: Callable[..., None], arguments: tuple[Any, ...], count: int, **options: Any) -> Any:
        assert work is distributed._process
        return start(_process, arguments, count, **{**options, "start_method": "forkserver"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "start_processes", fork)
        yield


def _process(
    rank: int,
    work: Callable[[Path], None],
    path: str,
    processes: int,
    port: int,
    threads: int,
    parent: int,
    failures: str,
) -> None:
    """As in `distributed`, where its parent is the one that was forked; it ends with the tests as well."""

    def watch() -> None:
        while psutil.pid_exists(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    gc.freeze()  # what was loaded is not looked through at every collection
    distributed._process(rank, work, path, processes, port, threads, os.getppid(), failures)
