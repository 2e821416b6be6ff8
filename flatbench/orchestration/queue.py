"""A list of run directories in, all of them finished: queueing, sharing with others, trying again."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatbench.executors.base import Ended, Executor
from flatbench.store import RunDirectory, claims, events

#: seconds between looks at runs that others work on
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Finished:
    """A run directory that is through, with the run's state: done, diverged or failed."""

    path: Path
    state: str


class Drive:
    """Finishes runs on an executor.

    A run that another process works on is waited for, and taken over if that process dies. A run whose worker
    died is tried again, after a pause that doubles each time.

    Args:
        retries: how often a run whose worker died is tried again.
        backoff: seconds before it is, the first time.

    Attributes:
        under_way: run directories that were handed to the executor and are not through.
    """

    def __init__(self, executor: Executor, retries: int = 2, backoff: float = 5.0) -> None:
        self.executor, self.retries, self.backoff = executor, retries, backoff
        self.under_way: list[Path] = []
        self._queue: deque[Path] = deque()
        self._retries: list[tuple[float, Path]] = []
        self._foreign_runs: list[Path] = []
        self._deaths: Counter[Path] = Counter()

    def run(self, paths: Sequence[Path]) -> Iterator[Finished]:
        """Finish the runs; each is yielded as soon as it is through, in any order."""
        self._queue.extend(paths)
        looked = time.monotonic()
        while self._queue or self._retries or self.under_way or self._foreign_runs:
            yield from self._submit()
            timeout = _POLL_SECONDS if self._retries or self._foreign_runs else 60.0
            if self.under_way:
                for ended in self.executor.ended(timeout):
                    yield from self._handle_end(ended)
            elif not self._queue:
                time.sleep(_POLL_SECONDS / 2)
            if time.monotonic() - looked > _POLL_SECONDS / 2:
                yield from self._poll_foreign_runs()
                self._requeue_due()
                looked = time.monotonic()

    def _submit(self) -> Iterator[Finished]:
        slots = self.executor.slots
        chosen: list[Path] = []
        while self._queue and (slots is None or len(self.under_way) + len(chosen) < slots):
            path = self._queue.popleft()
            directory = RunDirectory(path)
            if directory.settled():  # by another process, since this one planned
                yield Finished(path, directory.state())
            elif claims.holder(path) is not None:
                self._foreign_runs.append(path)
            else:
                chosen.append(path)
        if chosen:
            self.executor.submit(chosen)
            self.under_way += chosen

    def _handle_end(self, ended: Ended) -> Iterator[Finished]:
        path, state = ended.path, ended.state
        self.under_way.remove(path)
        if state is None and RunDirectory(path).settled():
            state = RunDirectory(path).state()  # its process died after it
        if state == "elsewhere":
            self._foreign_runs.append(path)
        elif state is None or state == "interrupted":
            yield from self._retry(path, ended.died or "stopped")
        else:
            yield Finished(path, state)

    def _retry(self, path: Path, died: str) -> Iterator[Finished]:
        self._deaths[path] += 1
        deaths = self._deaths[path]
        if deaths <= self.retries:
            pause = self.backoff * 2 ** (deaths - 1)
            events.record(path, "worker died", how=died, retry=deaths, pause=pause)
            self._retries.append((time.monotonic() + pause, path))
            return
        with claims.claimed(path) as claim:
            if claim is None:
                self._foreign_runs.append(path)
                return
            directory = RunDirectory(path)
            error = (
                f"its worker died {deaths} times ({died}); was memory short? `flatbench run` tries it again, "
                "from where it was last saved"
            )
            directory.write("failure", {"state": "failed", "error": error, "traceback": ""})
            events.record(path, "failed", error=error)
        yield Finished(path, "failed")

    def _poll_foreign_runs(self) -> Iterator[Finished]:
        for path in list(self._foreign_runs):
            directory = RunDirectory(path)
            if claims.holder(path) is not None:
                continue
            self._foreign_runs.remove(path)
            if directory.settled():
                yield Finished(path, directory.state())
            else:
                self._queue.append(path)

    def _requeue_due(self) -> None:
        now = time.monotonic()
        self._queue.extend(path for due, path in self._retries if due <= now)
        self._retries = [(due, path) for due, path in self._retries if due > now]
