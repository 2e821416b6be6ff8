"""Errors that flatbench raises on purpose; the command line prints their one line and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlatbenchError(Exception):
    """Anything flatbench itself found wrong while working (exit code 1), in one line.

    Messages quote files and other libraries: line breaks become spaces, and what would move a terminal's
    cursor or turn a line around is written out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(message))


class InputError(FlatbenchError):
    """What the user gave cannot be used; the message says what, where and what to do (exit code 2)."""


class StorageError(InputError):
    """Results cannot be written: no space, no permission, a file in the way. No run's own fault."""


class DivergedError(FlatbenchError):
    """Training produced a loss that is not finite."""


class NotFiniteError(FlatbenchError):
    """The loss of some examples is infinite or no number, as the mean over no labels is."""


class ModelChangedError(FlatbenchError):
    """A model that was lent out for a measurement did not come back as it was."""


class NotApplicableError(FlatbenchError):
    """A plug-in cannot serve this case; the message is the reason, and reports show it."""


#: characters of a message
_LONGEST = 2500


def one_line(text: object) -> str:
    r"""A message on one line.

    >>> one_line("damaged: \x1b[2J\n  no more")
    'damaged: \\x1b[2J no more'
    """
    return shown(" ".join(part.strip() for part in str(text).splitlines()), _LONGEST)


def visible(text: str, kept: str = "\n") -> str:
    r"""Text from elsewhere with what would move a cursor or turn a line around written out.

    >>> visible("a\x1b[2J\u202e")
    'a\\x1b[2J\\u202e'

    Args:
        kept: characters that stay as they are beside those that print.
    """
    if text.isprintable():
        return text
    others = {c for c in set(text) if not c.isprintable() and c not in kept}
    return text.translate({ord(c): repr(c)[1:-1] for c in others})


def shown(text: object, limit: int = 60) -> str:
    """Text from elsewhere, short and on one line, with what would move a terminal's cursor written out."""
    clean = visible(str(text)[: limit + 1], kept="")
    return clean if len(clean) <= limit else clean[: limit - 3] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """The tail of an 'unknown …' message: the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word[:200], names, n=1, cutoff=0.6)
    return f"did you mean '{shown(close[0])}'?" if close else f"known: {shown(', '.join(names), 1000)}"
