"""What a measure is given and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

LossFunction = Callable[[nn.Module, Mapping[str, Tensor]], tuple[Tensor, int]]


@dataclass(frozen=True)
class Subject:
    """A trained model with the data on which it is measured.

    Attributes:
        model: the model at its unperturbed trained point, peft-wrapped if it has an adapter.
        batches: training examples in a fixed order, on the model's device.
        loss: (model, batch) -> (mean loss, number of terms it is the mean of).
        adapted: names, in the base model, of the modules whose weights span the ``merged`` space.
        seed: seed of the run's "probes" stream.
        training: what the runner recorded while training: ``step_seconds`` (list, one per step),
            ``gradients_per_step``, ``peak_memory_bytes``, ``peak_memory_source``,
            ``trainable_parameters``, ``train_seconds``, ``clock``, ``device``, ``threads``, ``jobs``,
            ``energy_joules``, ``energy_source``, ``energy_missing``; empty for a checkpoint from elsewhere.
        pair: times so many pairs of blocks of steps of the run's method and of plain LoRA, see
            `flatbench.runs.paired_cost.paired`; None for what is no run.
    """

    model: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    loss: LossFunction
    adapted: Sequence[str]
    seed: int
    training: Mapping[str, Any] = field(default_factory=dict)
    pair: Callable[[int], dict[str, Any]] | None = None


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
