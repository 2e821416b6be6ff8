"""What every executor offers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Finished:
    """A run directory with which an executor is through.

    Attributes:
        state: the run's state; "interrupted" when its worker died under it, twice; or "elsewhere" when
            another process is at it.
    """

    path: Path
    state: str


class Executor(ABC):
    """Takes paths of run directories and has `flatbench.runner.finish` called on each, somewhere."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of workers; runs under way stop where they are and can be gone on with."""

    @abstractmethod
    def run(self, paths: Sequence[Path]) -> Iterator[Finished]:
        """Finish the runs; each is yielded as soon as it is through, in any order."""
