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

    def run(self, paths: Sequence[Path]) -> Iterator[Finished]:
        """Finish the runs. With one job they run in this process."""
        threads = max(1, cores() // self.jobs)
        if self.jobs == 1:
            from flatbench.runner import finish

            for path in paths:
                yield Finished(path, finish(path, threads))
        elif paths:
            yield from self._run_in_workers(paths, threads)

    def _run_in_workers(self, paths: Sequence[Path], threads: int) -> Iterator[Finished]:
        # spawn: a forked child would inherit torch's thread pools in an undefined state
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(self.jobs, len(paths)), mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
        )
        try:
            futures = {pool.submit(_finish, str(path), threads): path for path in paths}
            for future in as_completed(futures):
                try:
                    yield Finished(futures[future], future.result())
                except BrokenProcessPool:
                    yield Finished(futures[future], "interrupted")
        finally:
            # also when the caller stops listening (Ctrl-C): unstarted runs are dropped, workers end
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()


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
