"""Counts of runs by stage, condition, method and state, as `show` and `status` print them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

#: what a run can be, in the order in which it usually is
STATES = ("planned", "queued", "running", "interrupted", "trained", "done", "diverged", "failed", "damaged")


def table(runs: Iterable[tuple[str, str, str, str]]) -> Table:
    """A row a stage, condition and method; a column a state that occurs.

    Args:
        runs: stage, condition, method and state of each.
    """
    counts = Counter(runs)
    present = present_states(state for *_, state in counts)
    found = Table("stage", "condition", "method", *present, box=None, padding=(0, 2, 0, 0))
    for stage, condition, method in dict.fromkeys(key[:3] for key in counts):
        numbers = [str(counts[stage, condition, method, state] or "") for state in present]
        found.add_row(stage, escape(condition), escape(method), *numbers)
    return found


def present_states(states: Iterable[str]) -> list[str]:
    """The states that occur, in their usual order."""
    there = set(states)
    return [state for state in STATES if state in there]
