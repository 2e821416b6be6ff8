"""Runs on this machine, one after another or in worker processes side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
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
        # one pool a worker: a worker that dies breaks its own pool, and tells whose run it was
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._under_way: dict[Future[str], tuple[int, Path]] = {}

    def run(self, paths: Sequence[Path]) -> Iterator[Finished]:
        """Finish the runs. With one job they run in this process.

        A run whose worker died (killed for its memory, say) is tried once more after the others.
        """
        if self.jobs == 1:
            from flatbench.runner import finish

            for path in paths:
                yield Finished(path, finish(path, self.threads))
            return
        waiting, free, died = deque(paths), list(range(self.jobs)), set()
        while waiting or self._under_way:
            while waiting and free:
                worker, path = free.pop(), waiting.popleft()
                future = self._pool(worker).submit(_finish, str(path), self.threads, self.jobs)
                self._under_way[future] = worker, path
            done, _ = wait(self._under_way, return_when=FIRST_COMPLETED)
            for future in done:
                broken = isinstance(future.exception(), BrokenProcessPool)
                state = "interrupted" if broken else future.result()
                worker, path = self._under_way.pop(future)
                free.append(worker)
                if broken:
                    self._pools.pop(worker).shutdown()
                    if path not in died:
                        died.add(path)
                        waiting.append(path)
                        continue
                yield Finished(path, state)

    def _pool(self, worker: int) -> ProcessPoolExecutor:
        """Its process is kept between stages: it takes seconds to import torch and transformers."""
        if worker not in self._pools:
            # spawn: a forked child would inherit torch's thread pools in an undefined state
            context = multiprocessing.get_context("spawn")
            self._pools[worker] = ProcessPoolExecutor(
                1, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)
            )
        return self._pools[worker]

    def close(self) -> None:
        """End the workers: idle ones at once, and those under way as well if work was left undone."""
        busy = {worker for worker, _ in self._under_way.values()}
        for worker, pool in self._pools.items():
            processes = list((pool._processes or {}).values())
            if worker in busy:
                for process in processes:
                    process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
        self._pools, self._under_way = {}, {}


def _start_worker(parent: int) -> None:
    """Have the worker end when its parent is gone, however it went: nothing is left running."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(path: str, threads: int, jobs: int) -> str:
    from flatbench.runner import finish

    return finish(Path(path), threads, jobs)
