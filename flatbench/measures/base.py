"""Interface of measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatbench.subject.subject import Subject


@dataclass
class Track:
    """What one measurement of a run in training leaves to the next: eigenvectors ``(n, k)``."""

    vectors: Tensor | None = None


class MeasureInterrupted(KeyboardInterrupt):
    """Ctrl-C during a measure that had found something by then.

    Attributes:
        values: what it would have returned, as far as it came.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.values = values


class Measure(ABC):
    """Something to know about a trained model.

    The keyword-only arguments of a measure's constructor are its options in a study file. One with an option
    ``every`` is taken during training too, after every that many epochs, as columns of the run's history.
    """

    every: int | None = None

    @abstractmethod
    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure. The model, its modes, gradients and the global random state are left as they were found.

        Returns:
            JSON-able values by name: scalars become columns ``<measure label>.<name>`` of the results table,
            lists are kept for figures. Raises NotApplicableError with the reason where the measure has no
            meaning for this model.
        """

    def during(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Measure a model in training; ``track`` keeps what helps the next time."""
        return self(subject)
