"""A terminal on which nothing that a file holds moves the cursor, changes colours, or turns lines around."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from flatbench.errors import visible


class Terminal(Console):
    """rich's console, which writes out characters of texts that would control a terminal.

    Beside control characters these are the marks of bidirectional text, with which one name can look like
    another. Colours and boxes of rich's own are no such characters.
    """

    def render(self, *args: Any, **options: Any) -> Iterable[Segment]:
        """What a renderable is made of."""
        for segment in super().render(*args, **options):
            plain = segment.control or segment.text.isprintable()
            yield segment if plain else Segment(visible(segment.text), segment.style)


def quiet_controls() -> None:
    """From now on Python's warnings, and log messages that no handler takes, are written out as well."""
    formatted = warnings.formatwarning
    warnings.formatwarning = lambda *told, **more: visible(formatted(*told, **more))
    logging.lastResort = TerminalHandler()
    logging.lastResort.setLevel(logging.WARNING)


class TerminalHandler(logging.StreamHandler[Any]):
    """Log messages on the terminal, written out as `Terminal` does: other libraries quote files in theirs."""

    def format(self, record: logging.LogRecord) -> str:
        """A message without what would control the terminal."""
        return visible(super().format(record))
