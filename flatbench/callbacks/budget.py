"""The share of a training's time that measures may take, kept to while they run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    Each of several measures has an equal part of the time kept for it, until it has what it needs next, so
    that an expensive one is taken rarely and a cheap one often; what nobody waits for is free for all.

    Args:
        share: of the time of training without the measures; None for no limit.
        clock: seconds; another one for tests.
        labels: of the measures.

    Attributes:
        spent: seconds of measures, and of what is done around them.
    """

    def __init__(self, share: float | None, clock: Callable[[], float], labels: Iterable[str] = ()) -> None:
        self.share, self._clock = share, clock
        self.spent = 0.0
        self._start = clock()
        self._before = 0.0
        self._expected: dict[str, float] = {}
        self._spent_on = dict.fromkeys(labels, 0.0)

    def resume(self, trained: float, spent: float, since: float | None = None) -> None:
        """Go on, now or from ``since``, with a training of so many seconds, and its measures of so many."""
        self._start = self._clock() if since is None else since
        self._before, self.spent = trained + spent, spent
        self._spent_on = dict.fromkeys(self._spent_on, spent / max(len(self._spent_on), 1))

    @property
    def trained(self) -> float:
        """Seconds of training without its measures."""
        return self._clock() - self._start + self._before - self.spent

    def left(self, label: str) -> float:
        """Seconds that a measure may take now, without what is kept for the others."""
        if self.share is None:
            return math.inf
        allowed = self.share * self.trained
        part = allowed / max(len(self._spent_on), 1)
        kept = (
            min(max(part - spent, 0.0), self._expected.get(other, math.inf))
            for other, spent in self._spent_on.items()
            if other != label
        )
        return allowed - self.spent - sum(kept)

    def affords(self, label: str) -> bool:
        """Whether a measure may be begun."""
        left = self.left(label)
        return left > 0 and left >= self._expected.get(label, 0.0)

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Count everything inside that is no measure too: finding out what is due, and the record."""
        start, before = self._clock(), self.spent
        try:
            yield
        finally:
            self.spent = before + self._clock() - start

    @contextlib.contextmanager
    def spending(self, label: str) -> Iterator[Callable[[LossFunction], LossFunction]]:
        """Count what a measure takes inside; gives a wrapper for its loss, which raises `OverBudget`."""
        start = self._clock()
        end = start + self.left(label)

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
            if label in self._spent_on:
                self._spent_on[label] += taken
            self._expected[label] = factor * taken

    def state(self) -> dict[str, Any]:
        """The two times, as columns of a record."""
        return {"train_seconds": self.trained, "measure_seconds": self.spent}
