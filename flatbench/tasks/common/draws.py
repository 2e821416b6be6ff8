"""Few-shot draws: one for all runs, or one a run's seed."""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar

#: whose seed draws the examples: the task's ``split_seed``, the same for all runs, or the run's own
Draw = Literal["split_seed", "run_seed"]

Drawing = TypeVar("Drawing", bound=Any)


def drawn_by(task: Drawing, seed: int, drawn: tuple[str, ...]) -> Drawing:
    """The task as it would be with that ``split_seed``; what does not depend on it is shared.

    Args:
        drawn: names of its cached properties that depend on the draw.
    """
    other = copy.copy(task)
    other.split_seed = seed
    for name in drawn:
        other.__dict__.pop(name, None)
    return other
