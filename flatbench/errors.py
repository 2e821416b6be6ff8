"""Errors that flatbench raises on purpose; the command line prints their one line and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlatbenchError(Exception):
    """Anything flatbench itself found wrong while working (exit code 1)."""


class InputError(FlatbenchError):
    """What the user gave cannot be used; the message says what, where and what to do (exit code 2)."""


class StorageError(InputError):
    """Results cannot be written: no space, no permission, a file in the way. No run's own fault."""


class DivergedError(FlatbenchError):
    """Training produced a loss that is not finite."""


class ModelChangedError(FlatbenchError):
    """A model that was lent out for a measurement did not come back as it was."""


class NotApplicableError(FlatbenchError):
    """A plug-in cannot serve this case; the message is the reason, and reports show it."""


def shown(text: object, limit: int = 60) -> str:
    """Text from elsewhere, short and on one line, with what would move a terminal's cursor written out."""
    clean = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text)[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """The tail of an 'unknown …' message: the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word[:200], names, n=1, cutoff=0.6)
    return f"did you mean '{shown(close[0])}'?" if close else f"known: {shown(', '.join(names), 1000)}"
