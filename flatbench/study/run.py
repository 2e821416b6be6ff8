"""One training, by everything that decides its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flatbench import store


@dataclass(frozen=True)
class Run:
    """One training: everything that decides its outcome (``config``, ``data``), and its labels.

    Attributes:
        chosen_by: the validation metric that chooses among tuning runs.
        hyper: the hyper-parameters that its method's grid chose, by the names that the grid uses.
        measures: label -> measure, to be taken once the run is trained; not a part of its identity.
    """

    study: str
    condition: str
    method: str
    metric: str
    chosen_by: str
    hyper: Mapping[str, Any]
    config: Mapping[str, Any]
    data: str
    measures: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Hash of the configuration and the data's fingerprint."""
        return store.run_id(self.config, self.data)

    def labels(self) -> dict[str, Any]:
        """The run's place in the study. Two places may share one run, if they configure it alike."""
        return {
            "id": self.id,
            "stage": self.config["stage"],
            "condition": self.condition,
            "method": self.method,
            "hyper": dict(self.hyper),
        }

    def spec(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "study": self.study,
            "condition": self.condition,
            "method": self.method,
            "metric": self.metric,
            "chosen_by": self.chosen_by,
            "hyper": dict(self.hyper),
            "config": dict(self.config),
            "data": self.data,
            "measures": dict(self.measures),
        }
