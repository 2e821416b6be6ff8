"""Measures that are taken during training as well, each time from where the last one ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatbench import measures
from flatbench.errors import NotApplicableError
from flatbench.measures.base import Measure, Track, checked
from flatbench.subject.subject import Subject


class Tracker:
    """The measures of a run whose option ``every`` is set.

    Args:
        wanted: label -> {"name": …, options}, as in run.json.
    """

    def __init__(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        self._measures: dict[str, Measure] = {}
        for label, config in wanted.items():
            if config.get("every") is not None:
                options = {key: value for key, value in config.items() if key != "name"}
                self._measures[label] = measures.REGISTRY.load(config["name"])(**options)
        self._tracks = {label: Track() for label in self._measures}

    def due(self, epoch: int) -> bool:
        """Whether anything is to be measured after that many epochs."""
        return any(epoch % (measure.every or 1) == 0 for measure in self._measures.values())

    def row(self, subject: Subject, epoch: int) -> dict[str, Any]:
        """``<label>.<value>`` of what is due; a measure that does not apply leaves its reason."""
        found: dict[str, Any] = {}
        for label, measure in self._measures.items():
            if epoch % (measure.every or 1):
                continue
            try:
                values = checked(label, measure.during(subject, self._tracks[label]), finite=False)
            except NotApplicableError as reason:
                values = {"skipped": str(reason)}
            # a history has one number a column; lists are for the measure's own file
            found |= {f"{label}.{key}": v for key, v in values.items() if not isinstance(v, list | dict)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """The vectors from which the next measurements begin."""
        return {label: track.vectors for label, track in self._tracks.items() if track.vectors is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        for label, vectors in state.items():
            if label in self._tracks:
                self._tracks[label].vectors = vectors
