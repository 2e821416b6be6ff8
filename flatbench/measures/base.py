"""Interface of measures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flatbench.errors import InputError
from flatbench.subject.subject import Subject


@dataclass
class Track:
    """What one measurement of a run in training leaves to the next: eigenvectors ``(n, k)``."""

    vectors: Tensor | None = None


class MeasureInterrupted(KeyboardInterrupt):
    """Ctrl-C during a measure that had found something by then.

    Attributes:
        values: what it would have returned, as far as it came.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__("interrupted")
        self.values = values


class Measure(ABC):
    """Something to know about a trained model.

    The keyword-only arguments of a measure's constructor are its options in a study file. One with an option
    ``every`` is taken during training too, after every that many epochs, as columns of the run's history.
    """

    every: int | None = None

    @abstractmethod
    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure. The model, its modes, gradients and the global random state are left as they were found.

        Returns:
            JSON-able values by name: scalars become columns ``<measure label>.<name>`` of the results table,
            lists are kept for figures. Raises NotApplicableError with the reason where the measure has no
            meaning for this model.
        """

    def during(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Measure a model in training; ``track`` keeps what helps the next time."""
        return self(subject)


def checked(label: str, values: Any, *, finite: bool = True) -> dict[str, Any]:
    """A measure's values, as they can be stored.

    Args:
        label: the measure's, for messages.
        finite: whether they go into a file that holds neither NaN nor infinity; a history holds both, and a
            training that is about to diverge goes on to do so.

    Raises InputError for what is no number, text or None by name, or lists of these.
    """
    where = f"measure '{label}'"
    if not isinstance(values, dict):
        raise InputError(f"{where} returned {_kind(values)}; return a dictionary of values by name")
    for name, value in values.items():
        if not isinstance(name, str):
            raise InputError(f"{where} returned a value named {name!r}; names are text")
        _check(f"{where}: value '{name}'", value, finite)
    return values


def _check(where: str, value: Any, finite: bool) -> None:
    if isinstance(value, list | tuple):
        for one in value:
            _check(where, one, finite)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _check(f"{where} at {key!r}", one, finite)
    elif finite and isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}; return None where it is not defined")
    elif value is not None and not isinstance(value, str | bool | int | float):
        raise InputError(f"{where} is {_kind(value)}; return float(…), text, None, or lists of them")


def _kind(value: Any) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a {name}"
