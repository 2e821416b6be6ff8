"""A trained model with the data on which it is measured."""

from __future__ import annotations

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
            ``energy_joules``, ``energy_source``, ``energy_missing``, ``core_wait_share``; empty for a
            checkpoint from elsewhere.
        pair: times so many pairs of blocks of steps of the run's method and of plain LoRA, see
            `flatbench.runs.paired_cost.paired`; None for what is no run.
        optimizer: the method that trains the model now, at its unperturbed point; None for a finished model.
        optimizer_state: reads what the optimizer kept when the model was saved, see
            `flatbench.optim.moments.OptimizerState`; None where nothing was saved.
        others: reads other data than the training examples, in batches, by name, such as ``validation``.
    """

    model: nn.Module
    batches: Sequence[Mapping[str, Tensor]]
    loss: LossFunction
    adapted: Sequence[str]
    seed: int
    training: Mapping[str, Any] = field(default_factory=dict)
    pair: Callable[[int], dict[str, Any]] | None = None
    optimizer: Any = None
    optimizer_state: Callable[[], Any] | None = None
    others: Mapping[str, Callable[[], Sequence[Mapping[str, Tensor]]]] = field(default_factory=dict)
