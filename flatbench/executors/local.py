"""Runs on this machine, one after another or in worker processes side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated

from pydantic import Field

from flatbench.executors.base import Executor, Finished


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Local(Executor):
    """Worker processes on this machine that share its cores.

    Args:
        jobs: runs side by side; each gets its share of the cores as threads.
    """

    def __init__(self, *, jobs: Annotated[int, Field(ge=1)] = 1) -> None:
        self.jobs = jobs
        self.threads = max(1, cores() // jobs)
        self._pool: ProcessPoolExecutor | None = None
        self._under_way = False

    def run(self, paths: Sequence[Path]) -> Iterator[Finished]:
        """Finish the runs. With one job they run in this process."""
        if self.jobs == 1:
            from flatbench.runner import finish

            for path in paths:
                yield Finished(path, finish(path, self.threads))
            return
        futures = {self._workers().submit(_finish, str(path), self.threads): path for path in paths}
        self._under_way = True
        for future in as_completed(futures):
            try:
                yield Finished(futures[future], future.result())
            except BrokenProcessPool:
                yield Finished(futures[future], "interrupted")
        self._under_way = False

    def _workers(self) -> ProcessPoolExecutor:
        """The pool, kept between stages: a worker takes seconds to import torch and transformers."""
        if self._pool is None:
            # spawn: a forked child would inherit torch's thread pools in an undefined state
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.jobs, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
            )
        return self._pool

    def close(self) -> None:
        """End the workers: idle ones at once, and those under way as well if work was left undone."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        workers = list((pool._processes or {}).values())
        if self._under_way:
            for worker in workers:
                worker.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Have the worker end when its parent is gone, however it went: nothing is left running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(path: str, threads: int) -> str:
    from flatbench.runner import finish

    return finish(Path(path), threads)
