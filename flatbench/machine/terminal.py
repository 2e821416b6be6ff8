"""A terminal on which nothing that a file holds moves the cursor, changes colours, or turns lines around."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment


class Terminal(Console):
    """rich's console, which writes out characters of texts that would control a terminal.

    Beside control characters these are the marks of bidirectional text, with which one name can look like
    another. Colours and boxes of rich's own are no such characters.
    """

    def render(self, *args: Any, **options: Any) -> Iterable[Segment]:
        """What a renderable is made of."""
        for segment in super().render(*args, **options):
            plain = segment.control or segment.text.isprintable()
            yield segment if plain else Segment(_written_out(segment.text), segment.style)


def _written_out(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
