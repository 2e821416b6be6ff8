"""At which of its two points an optimizer's model is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Point:
    """At which of its two points an optimizer's model is; one object, which every wrapper of it shares.

    Attributes:
        training: whether it is at the one at which gradients are taken.
        returns: whether the next forward pass in training mode goes there.
        held: whether a closure runs, in which no forward pass is an evaluation.
    """

    training: bool = False
    returns: bool = True
    held: bool = False

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Stay there, whatever mode the model is in."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before
