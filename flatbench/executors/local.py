"""Runs on this machine, one after another or in worker processes side by side."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

from pydantic import Field

from flatbench.executors.base import Ended, Executor
from flatbench.executors.worker import finish, load, start_worker
from flatbench.machine import forking

P = ParamSpec("P")
T = TypeVar("T")

_DRIVER = Path("/proc/driver/nvidia/gpus")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [device.strip() for device in visible.split(",") if device.strip() not in ("", "-1")]
    return [str(i) for i in range(len(list(_DRIVER.iterdir())))] if _DRIVER.is_dir() else []


#: worker processes of one machine
MOST_JOBS = 1024


class Local(Executor):
    """Worker processes on this machine that share its cores and its GPUs.

    Args:
        jobs: runs side by side; each gets its share of the cores as threads, and one GPU, which it shares
            with others if there are fewer GPUs than jobs.
        gpus_per_run: GPUs for each run, where one run is to have several.
    """

    def __init__(
        self,
        *,
        jobs: Annotated[int, Field(ge=1, le=MOST_JOBS)] = 1,
        gpus_per_run: Annotated[int, Field(ge=1, le=MOST_JOBS)] = 1,
    ) -> None:
        self.jobs = self.slots = jobs
        self.apart = jobs > 1
        self.gpus_per_run = gpus_per_run
        self.threads = max(1, cores() // jobs)
        # one pool a worker: a worker that dies breaks its own pool, and tells whose run it was
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._under_way: dict[Path, tuple[int, Future[tuple[str, str | None]]]] = {}
        self._queue: deque[Path] = deque()

    def warm(self, also: Callable[[], object] | None = None) -> None:
        """Start the workers, and have them import torch and call the function."""
        if self.apart:
            for worker in range(self.jobs):
                self._pool(worker).submit(load, also)

    def call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Have the first worker do it between runs: it has imported what there is to import."""
        if not self.apart:
            return super().call(function, *arguments, **named)
        try:
            return self._pool(0).submit(function, *arguments, **named).result()
        except BrokenProcessPool:
            self._pools.pop(0).shutdown()
            return super().call(function, *arguments, **named)

    def submit(self, paths: Sequence[Path]) -> None:
        """Give each run to a free worker. With one job the work is done in this process, by `ended`."""
        if not self.apart:
            self._queue.extend(paths)
            return
        free = sorted(set(range(self.jobs)) - {worker for worker, _ in self._under_way.values()})
        for worker, path in zip(free, paths, strict=False):
            self._under_way[path] = worker, self._submit(worker, path)

    def _submit(self, worker: int, path: Path) -> Future[tuple[str, str | None]]:
        asked = (str(path), self.threads, self.jobs, self.lease)
        try:
            return self._pool(worker).submit(finish, *asked)
        except BrokenProcessPool:  # it died between runs, which costs no run anything
            self._pools.pop(worker).shutdown()
            return self._pool(worker).submit(finish, *asked)

    def ended(self, timeout: float) -> list[Ended]:
        """Wait for a worker, or with one job work in this process."""
        if not self.apart:
            from flatbench.runs.finish import finish

            path = self._queue.popleft()
            return [Ended(path, finish(path, self.threads, 1, self.lease))]
        futures = {future: (path, worker) for path, (worker, future) in self._under_way.items()}
        done, _ = wait(futures, timeout=timeout, return_when=FIRST_COMPLETED)
        return [self._collect(*futures[future], future) for future in done]

    def _collect(self, path: Path, worker: int, future: Future[tuple[str, str | None]]) -> Ended:
        del self._under_way[path]
        if isinstance(future.exception(), BrokenProcessPool):
            pool = self._pools.pop(worker)
            processes = _processes(pool)
            pool.shutdown()  # it waits for them: a process that dies is seen before it has an exit code
            codes = [process.exitcode for process in processes]
            return Ended(path, None, _exit_text(codes[0] if codes else None))
        state, stop = future.result()
        if stop is not None:  # somebody asked this worker to stop, and not the study
            self._pools.pop(worker).shutdown(wait=False)
            return Ended(path, state, stop)
        return Ended(path, state)

    def give_up(self, path: Path) -> bool:
        """Kill a run's worker, suspended or not."""
        if path not in self._under_way:
            return False
        worker, _ = self._under_way[path]
        for process in _processes(self._pools[worker]):
            process.kill()
        return True

    def _pool(self, worker: int) -> ProcessPoolExecutor:
        """Its process is kept between stages: it takes seconds to import torch and transformers."""
        if worker not in self._pools:
            start = (forking.environment(), self._devices(worker))
            self._pools[worker] = ProcessPoolExecutor(
                1, mp_context=forking.context(), initializer=start_worker, initargs=start
            )
        return self._pools[worker]

    def _devices(self, worker: int) -> str | None:
        """The worker's GPUs in CUDA_VISIBLE_DEVICES; None where there are none to share out."""
        every = gpus()
        if not every:
            return None
        first = worker * self.gpus_per_run
        return ",".join(dict.fromkeys(every[(first + i) % len(every)] for i in range(self.gpus_per_run)))

    def close(self) -> None:
        """End the workers. Those under way are asked to save where they are, and killed after `grace`."""
        busy = dict(self._under_way.values())
        for worker in busy:
            for process in _processes(self._pools[worker]):
                process.terminate()
        wait(busy.values(), timeout=self.grace)
        for worker, future in busy.items():
            if not future.done():
                for process in _processes(self._pools[worker]):
                    process.kill()
        with ThreadPoolExecutor() as side_by_side:  # a process with torch takes its time to end
            for pool in self._pools.values():
                side_by_side.submit(pool.shutdown, wait=True, cancel_futures=True)
        self._pools, self._under_way = {}, {}
        self._queue.clear()


def _processes(pool: ProcessPoolExecutor) -> list[multiprocessing.process.BaseProcess]:
    return list((pool._processes or {}).values())


def _exit_text(code: int | None) -> str:
    if code is None:
        return "for an unknown reason"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
