"""What a measure returns and what its options are, as a plug-in of somebody else may have them wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flatbench.config.registry import Registry
from flatbench.errors import InputError
from flatbench.measures.base import Measure, Track, checked
from flatbench.runs.during_training import Tracker
from flatbench.subject.subject import Subject


class ByPlace:
    """A plug-in whose option could be given by place."""

    def __init__(self, strength: float = 0.1, *, other: int = 1) -> None:
        self.strength, self.other = strength, other


class Returning(Measure):
    """Returns what it is told to."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __call__(self, subject: Subject) -> dict[str, Any]:
        return self.values  # type: ignore[no-any-return]


RIGHT = {"a": 1.5, "b": 3, "c": None, "d": "text", "e": [1.0, [2, None]], "f": True, "g": {"1": 2.0}}


def test_what_is_right_is_left_as_it_is() -> None:
    assert checked("own", RIGHT) is RIGHT


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (3.0, "measure 'own' returned a float; return a dictionary"),
        ({"x": np.float32(1)}, "measure 'own': value 'x' is a numpy.float32"),
        ({"x": torch.tensor(1.0)}, "measure 'own': value 'x' is a torch.Tensor"),
        ({"x": [1.0, np.int64(2)]}, "value 'x' is a numpy.int64"),
        ({"x": {"y": float("inf")}}, "value 'x' at 'y' is inf; return None"),
        ({"x": float("nan")}, "value 'x' is nan; return None"),
        ({1: 2.0}, "a value named 1; names are text"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(values: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        checked("own", values)


def test_a_history_holds_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is about to diverge is not ended by a measure; a tensor is no number there either."""
    tracker, subject = Tracker({}), Any
    monkeypatch.setattr(tracker, "_measures", {"own": Returning({"x": float("nan"), "y": [1.0]})})
    monkeypatch.setattr(tracker, "_tracks", {"own": Track()})
    found = tracker.row(subject, 1)  # type: ignore[arg-type]
    assert list(found) == ["own.x"]
    assert np.isnan(found["own.x"])
    monkeypatch.setattr(tracker, "_measures", {"own": Returning({"x": torch.tensor(1.0)})})
    with pytest.raises(InputError, match=r"value 'x' is a torch\.Tensor"):
        tracker.row(subject, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["task", "measure"])
def test_an_option_that_is_not_keyword_only_is_refused_by_name(kind: str) -> None:
    registry = Registry(kind, {"by_place": f"{__name__}:ByPlace"}, group="none")
    with pytest.raises(InputError, match="the option 'strength' is not keyword-only"):
        registry.options("by_place")


def test_an_optimizer_is_handed_two_arguments_by_place() -> None:
    registry = Registry("optimizer", {"by_place": f"{__name__}:ByPlace"}, group="none")
    assert list(registry.options("by_place").model_fields) == ["other"]
