"""A list of run directories in, all of them finished: queueing, sharing with others, trying again."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flatbench.executors.base import Ended, Executor
from flatbench.store import RunDirectory, claims, events

#: seconds between looks at runs that others work on
_POLL_SECONDS = 1.0
#: share of a lease after which silence is said; after the whole of it the worker is given up
_SAID = 0.5


@dataclass(frozen=True)
class Finished:
    """A run directory that is through, with the run's state: done, diverged or failed."""

    path: Path
    state: str


class Silences:
    """For how long claims were not renewed, in seconds during which this process looked.

    Were it suspended together with its workers, it would not blame them.
    """

    def __init__(self) -> None:
        self._heartbeats: dict[Path, tuple[int, float]] = {}
        self._before: dict[Path, int | None] = {}
        self._reported: set[Path] = set()
        self._last_check = time.monotonic()

    def begin(self, path: Path) -> None:
        """A run is handed over: what claim it has is not yet its new worker's."""
        self.forget(path)
        self._before[path] = claims.renewed(path)

    def look(self, paths: Sequence[Path], longest: float) -> list[tuple[Path, float]]:
        """Run directory and seconds of silence, of those whose worker was heard of before.

        Args:
            longest: seconds between two looks; longer ones are as good as none.
        """
        now = time.monotonic()
        passed = now - self._last_check
        self._last_check = now
        seen = {}
        for path in paths:
            renewed = claims.renewed(path)
            if renewed is None or renewed == self._before.get(path):
                continue
            then, seconds = self._heartbeats.get(path, (None, 0.0))
            more = passed if passed <= longest else 0.0
            seen[path] = renewed, seconds + more if then == renewed else 0.0
        self._heartbeats = seen
        self._reported &= {path for path, (_, seconds) in seen.items() if seconds}
        return [(path, seconds) for path, (_, seconds) in seen.items() if seconds]

    def is_new(self, path: Path) -> bool:
        """Whether this silence was not asked about before."""
        known = path in self._reported
        self._reported.add(path)
        return not known

    def forget(self, path: Path) -> None:
        """Begin to count anew."""
        self._heartbeats.pop(path, None)
        self._reported.discard(path)


class Drive:
    """Finishes runs on an executor.

    A run that another process works on is waited for, and taken over if that process dies. A run whose worker
    died is tried again, after a pause that doubles each time.

    A worker that gives no sign of life, as one that is suspended, is told of within its lease, and given up
    after it.

    Args:
        retries: how often a run whose worker died is tried again.
        backoff: seconds before it is, the first time.

    Attributes:
        under_way: run directories that were handed to the executor and are not through.
        say: told in a line what the user should know.
    """

    def __init__(self, executor: Executor, retries: int = 2, backoff: float = 5.0) -> None:
        self.executor, self.retries, self.backoff = executor, retries, backoff
        self.under_way: list[Path] = []
        self.say: Callable[[str], None] = lambda line: None
        self._silences = Silences()
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
            timeout = _POLL_SECONDS if self._retries or self._foreign_runs else self._longest_wait
            if self.under_way:
                for ended in self.executor.ended(timeout):
                    yield from self._handle_end(ended)
            elif not self._queue:
                time.sleep(_POLL_SECONDS / 2)
            if time.monotonic() - looked > _POLL_SECONDS / 2:
                yield from self._poll_foreign_runs()
                self._requeue_due()
                self._look_for_silence()
                looked = time.monotonic()

    @property
    def _longest_wait(self) -> float:
        return min(60.0, self.executor.lease / 6)

    def _look_for_silence(self) -> None:
        lease = self.executor.lease
        for path, seconds in self._silences.look(self.under_way, 2 * self._longest_wait):
            if seconds >= lease:
                given_up = self.executor.give_up(path)
                self._silences.forget(path)
                events.record(path, "silent", seconds=round(seconds), given_up=given_up)
                what = "is given up, and the run tried again" if given_up else "may be taken over by others"
                self.say(f"{path.name}: its worker gave no sign of life for {seconds:.0f} s and {what}")
            elif seconds >= _SAID * lease and self._silences.is_new(path):
                self.say(
                    f"{path.name}: its worker gives no sign of life since {seconds:.0f} s; is it suspended? "
                    f"After {lease:.0f} s the run is worked on elsewhere"
                )

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
            for path in chosen:
                self._silences.begin(path)
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
