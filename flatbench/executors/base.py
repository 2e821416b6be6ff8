"""Interface of executors: submit run directories, and report those that have ended."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Self, TypeVar

from flatbench.errors import FlatbenchError
from flatbench.executors.worker import start_worker
from flatbench.machine import forking
from flatbench.store.claims import LEASE

P = ParamSpec("P")
T = TypeVar("T")

#: seconds that runs get to save where they are when they are asked to stop
GRACE = 30.0


def own_variables() -> dict[str, str]:
    """The environment's FLATBENCH_… variables: which workers on other machines need as well."""
    return {key: value for key, value in os.environ.items() if key.startswith("FLATBENCH_")}


@dataclass(frozen=True)
class Ended:
    """A run directory that an executor is through with.

    Attributes:
        state: what `flatbench.runs.finish.finish` said; None if its process died under it.
        died: how the process ended, in a few words, if it did.
    """

    path: Path
    state: str | None
    died: str | None = None


class Executor(ABC):
    """Has `flatbench.runs.finish.finish` called on run directories, somewhere.

    The keyword-only arguments of a constructor are the executor's options in a site file. Nothing but paths
    and numbers goes to the workers; whatever they do is found in the run directories, also by those who come
    later.

    Attributes:
        slots: runs that are worked on at once; None if that is somebody else's business.
        apart: whether the work is done in other processes than this one.
        lease: seconds after which a run whose worker gives no sign of life may be taken over.
        grace: seconds that runs get to save where they are when they are asked to stop.
    """

    slots: int | None = None
    apart: bool = True
    lease: float = LEASE
    grace: float = GRACE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self, also: Callable[[], object] | None = None) -> None:  # noqa: B027 - or there is nothing
        """Begin what takes time before the first run can (importing torch), while the study is planned.

        Args:
            also: what workers that are there by then may call as well, for what it imports.
        """

    def call(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """What a function returns that is called in another process, so that this one stays small.

        Raises what the function raises, and FlatbenchError if its process dies.
        """
        start = (forking.environment(), None)
        with ProcessPoolExecutor(1, forking.context(), initializer=start_worker, initargs=start) as process:
            try:
                return process.submit(function, *arguments, **named).result()
            except BrokenProcessPool:
                raise FlatbenchError(
                    f"the process that was to plan the study died ({function.__name__}); was memory short?"
                ) from None

    @abstractmethod
    def submit(self, paths: Sequence[Path]) -> None:
        """Take on run directories, no more than there are free slots."""

    @abstractmethod
    def ended(self, timeout: float) -> list[Ended]:
        """The runs that it is through with since last asked; waits for one, so many seconds at most.

        Raises what a run raised: StorageError, or Stopped when this very process was asked to stop.
        """

    def give_up(self, path: Path) -> bool:
        """End the worker of a run that gives no sign of life, so that the run can be tried elsewhere.

        Returns whether it was ended; `ended` then reports the run. Where workers are a cluster's they are
        left alone: another process may take the run over, and they let go when they go on.
        """
        return False

    @abstractmethod
    def close(self) -> None:
        """Let go of workers: runs under way get `grace` seconds to save where they are."""
