"""How a study's progress is shown: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Display(Protocol):
    """Who wants to know how a study gets on."""

    def stage(self, name: str, runs: int, done: int) -> None:
        """A stage of ``runs`` runs begins, ``done`` of which are finished already."""

    def advance(self, runs: float) -> None:
        """``runs`` runs of the stage are finished in all, the fractions of those under way included."""

    def line(self, text: str) -> None:
        """Something happened."""


class _Bar:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.task = progress.add_task("", total=None, visible=False)

    def stage(self, name: str, runs: int, done: int) -> None:
        self.progress.reset(self.task, description=name, total=runs, completed=done, visible=True)

    def advance(self, runs: float) -> None:
        self.progress.update(self.task, completed=runs)

    def line(self, text: str) -> None:
        self.progress.console.print(escape(text), highlight=False, soft_wrap=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console

    def stage(self, name: str, runs: int, done: int) -> None:
        self.line(f"{name}: {runs} runs, {done} finished already")

    def advance(self, runs: float) -> None:
        pass

    def line(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)


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
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        yield _Bar(progress)
