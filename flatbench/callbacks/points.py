"""The point of a training at which it is evaluated, gone to and left again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from flatbench.machine import random_streams
from flatbench.optim.base.modes import BaseModes, is_method


def method_of(optimizer: Any) -> Any:
    """The optimizer itself, without accelerate's and Lightning's wrappers."""
    while optimizer is not None and not is_method(optimizer):
        inner = vars(optimizer).get("optimizer") or vars(optimizer).get("_optimizer")
        if inner is None or not hasattr(inner, "param_groups"):
            break
        optimizer = inner
    return optimizer


@contextlib.contextmanager
def unperturbed(optimizer: Any, evaluated: bool = False) -> Iterator[None]:
    """Inside, the weights are those that are evaluated and saved; afterwards training goes on where it was.

    Random streams (of Python and NumPy too) are put back.

    Args:
        optimizer: what `method_of` gave; None for none.
        evaluated: the training itself has gone to that point already.
    """
    kept = random_streams.state()
    try:
        if is_method(optimizer):
            with optimizer.at_evaluation():
                yield
        elif evaluated or optimizer is None:
            yield
        else:
            modes = BaseModes(optimizer)  # schedule-free optimizers and their like compute their way back
            modes.eval()
            try:
                yield
            finally:
                modes.train()
    finally:
        random_streams.restore(kept)
