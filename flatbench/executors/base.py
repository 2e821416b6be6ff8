"""What every executor offers: to take jobs, each a few run directories, and to say when they have ended."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from flatbench.claims import LEASE

#: seconds that runs get to save where they are when they are asked to stop
GRACE = 30.0


@dataclass(frozen=True, eq=False)
class Job:
    """Run directories that are finished one after another in one process somewhere.

    Attributes:
        handle: what the executor knows it by.
    """

    paths: tuple[Path, ...]
    handle: Any = None


@dataclass(frozen=True)
class Ended:
    """A job that is over.

    Attributes:
        states: what `flatbench.runner.finish` said of each run that it came to.
        died: how its process ended under it, in a few words; None if it came to its end.
    """

    job: Job
    states: Mapping[Path, str] = field(default_factory=dict)
    died: str | None = None


class Executor(ABC):
    """Has `flatbench.runner.finish` called on run directories, somewhere.

    The keyword-only arguments of a constructor are the executor's options in a site file. Nothing but paths
    and numbers goes to the workers; whatever they do is found in the run directories, also by those who come
    later.

    Attributes:
        slots: jobs that are worked on at once; None if that is somebody else's business.
        runs_per_job: runs that share a job.
        apart: whether the work is done in other processes than this one.
        outlives: whether jobs go on when this process has gone.
        lease: seconds after which a run whose worker gives no sign of life may be taken over.
        grace: seconds that runs get to save where they are when they are asked to stop.
    """

    slots: int | None = None
    runs_per_job: int = 1
    apart: bool = True
    outlives: ClassVar[bool] = False
    lease: float = LEASE
    grace: float = GRACE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self) -> None:  # noqa: B027 - there may be nothing to begin
        """Begin what takes time before the first job can (importing torch), while the study is planned."""

    @abstractmethod
    def submit(self, groups: Sequence[Sequence[Path]]) -> list[Job]:
        """Take on a job for each group of run directories."""

    @abstractmethod
    def ended(self, jobs: Sequence[Job], timeout: float) -> list[Ended]:
        """Those of the jobs that are over; waits for one, so many seconds at most.

        Raises what a job raised: StorageError, or Stopped when this very process was asked to stop.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of workers: runs under way get `grace` seconds to save where they are."""
