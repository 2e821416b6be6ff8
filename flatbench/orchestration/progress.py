"""Show a study's progress: a bar and a table of runs on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

#: rows of the table of runs under way
_MOST_ROWS = 12


@dataclass(frozen=True)
class UnderWay:
    """A run that somebody works on: its name, the share of its training that is done, seconds so far."""

    name: str
    fraction: float
    seconds: float

    @property
    def left(self) -> float | None:
        """Seconds until it is trained, at the pace so far; None before anything can be said."""
        return self.seconds * (1 - self.fraction) / self.fraction if self.fraction > 0 else None


class Display(Protocol):
    """Receiver of a study's progress."""

    def stage(self, name: str, runs: int, done: int) -> None:
        """A stage of ``runs`` runs begins, ``done`` of which are finished already."""

    def look(self, done: int, under_way: Sequence[UnderWay]) -> None:
        """So many runs of the stage are finished, and these are under way."""

    def line(self, text: str) -> None:
        """Something happened."""


class _Live:
    def __init__(self, live: Live, progress: Progress) -> None:
        self.live, self.progress = live, progress
        self.task = progress.add_task("", total=None, visible=False)

    def stage(self, name: str, runs: int, done: int) -> None:
        self.progress.reset(self.task, description=name, total=runs, completed=done, visible=True)

    def look(self, done: int, under_way: Sequence[UnderWay]) -> None:
        self.progress.update(self.task, completed=done + sum(run.fraction for run in under_way))
        self.live.update(Group(self.progress, table(under_way)))

    def line(self, text: str) -> None:
        self.live.console.print(escape(text), highlight=False, soft_wrap=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console

    def stage(self, name: str, runs: int, done: int) -> None:
        self.line(f"{name}: {runs} runs, {done} finished already")

    def look(self, done: int, under_way: Sequence[UnderWay]) -> None:
        pass

    def line(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)


def table(under_way: Sequence[UnderWay]) -> Table:
    """The runs under way: name, progress, time so far and left."""
    shown = Table("under way", "trained", "for", "left", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for run in under_way[:_MOST_ROWS]:
        shown.add_row(escape(run.name), f"{run.fraction:.0%}", duration(run.seconds), duration(run.left))
    if len(under_way) > _MOST_ROWS:
        shown.add_row(f"and {len(under_way) - _MOST_ROWS} more")
    return shown


def duration(seconds: float | None) -> str:
    """``1:02:03``; a dash if it is not known."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def display(console: Console) -> Iterator[Display]:
    """A display on ``console``, by whether it is a terminal.

    FORCE_COLOR, which notebook kernels set, asks for colours and not for bars.
    """
    if not (console.is_terminal and console.file.isatty()):
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    progress = Progress(*columns, console=console, speed_estimate_period=3600)
    with Live(progress, console=console, refresh_per_second=4) as live:
        yield _Live(live, progress)
