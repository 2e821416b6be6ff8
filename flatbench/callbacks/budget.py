"""The share of a training's time that measures may take, kept to while they run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from flatbench.subject.subject import LossFunction


class OverBudget(BaseException):
    """A measure has used up what it may take; no Exception, which measures may catch and go on after."""


class Budget:
    """Time of measures against time of training, which both count from the start of the training.

    Nothing is known of a measure's cost before it was taken once, so that the first is begun where there is
    any time, and broken off where that is used up. From then on a measurement is begun where its cost, or
    twice that at which it was broken off, is there: what is spent is never more than the share, but for the
    one evaluation of a loss during which time runs out, and the way back to the weights of training.

    Args:
        share: of the time of training without the measures; None for no limit.
        clock: seconds; another one for tests.

    Attributes:
        spent: seconds of measures.
    """

    def __init__(self, share: float | None, clock: Callable[[], float]) -> None:
        self.share, self._clock = share, clock
        self.spent = 0.0
        self._begun = clock()
        self._before = 0.0
        self._expected: dict[str, float] = {}

    def resume(self, trained: float, spent: float, since: float | None = None) -> None:
        """Go on, now or from ``since``, with a training of so many seconds, and its measures of so many."""
        self._begun = self._clock() if since is None else since
        self._before, self.spent = trained + spent, spent

    @property
    def trained(self) -> float:
        """Seconds of training without its measures."""
        return self._clock() - self._begun + self._before - self.spent

    def left(self) -> float:
        """Seconds that measures may take now."""
        return math.inf if self.share is None else self.share * self.trained - self.spent

    def affords(self, label: str) -> bool:
        """Whether a measure may be begun."""
        left = self.left()
        return left > 0 and left >= self._expected.get(label, 0.0)

    @contextlib.contextmanager
    def spending(self, label: str) -> Iterator[Callable[[LossFunction], LossFunction]]:
        """Count what a measure takes inside; gives a wrapper for its loss, which raises `OverBudget`."""
        start = self._clock()
        end = start + self.left()

        def limited(loss: LossFunction) -> LossFunction:
            def within(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
                if self._clock() > end:
                    raise OverBudget
                return loss(model, batch)

            return within

        factor = 1.0
        try:
            yield limited
        except OverBudget:
            factor = 2.0
            raise
        finally:
            taken = self._clock() - start
            self.spent += taken
            self._expected[label] = factor * taken

    def state(self) -> dict[str, Any]:
        """The two times, as columns of a record."""
        return {"train_seconds": self.trained, "measure_seconds": self.spent}
