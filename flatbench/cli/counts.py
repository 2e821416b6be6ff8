"""Counts of runs by stage, condition, method and state, as `show` and `status` print them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table

from flatbench.config.words import condition_words

#: what a run can be, in the order in which it usually is
STATES = ("planned", "queued", "running", "interrupted", "trained", "done", "diverged", "failed", "damaged")


def table(runs: Iterable[tuple[str, str, str, str]]) -> Table:
    """A row a stage, method and condition, with how many of its runs are in which state.

    Args:
        runs: stage, condition, method and state of each.
    """
    counts = Counter(runs)
    present = present_states(state for *_, state in counts)
    several = any(condition for _, condition, _, _ in counts)
    found = Table(box=None, padding=(0, 2, 0, 0))
    found.add_column("stage", no_wrap=True)
    found.add_column("method", overflow="fold", min_width=_name_width([method for _, _, method, _ in counts]))
    if several:
        found.add_column("condition", overflow="fold", min_width=len("condition"))
    found.add_column("runs", overflow="fold")
    for stage, condition, method in dict.fromkeys(key[:3] for key in counts):
        own = [(counts[stage, condition, method, state], state) for state in present]
        told = ", ".join(f"{count} {state}" for count, state in own if count)
        words = [escape(condition_words(condition))] if several else []
        found.add_row(stage, escape(method), *words, told)
    return found


def _name_width(names: Iterable[str]) -> int:
    """So wide that no name of usual length is broken."""
    return min(max(map(len, names), default=0), 30)


def present_states(states: Iterable[str]) -> list[str]:
    """The states that occur, in their usual order."""
    there = set(states)
    return [state for state in STATES if state in there]
