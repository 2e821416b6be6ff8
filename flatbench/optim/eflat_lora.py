"""EFlat-LoRA, called EFMLoRA in the paper's later version (arXiv 2508.00522)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flatbench.optim.base import PerturbationOptions
from flatbench.optim.base.full_space import Estimate, Factor, FullSpace
from flatbench.optim.base.two_points import Displaced


@dataclass(kw_only=True, eq=False, repr=False)
class EFlatLoRA(PerturbationOptions, Displaced):
    """EFlat-LoRA (EFMLoRA): Flat-LoRA with one gradient a step and a moving average of perturbations.

    Algorithm 2 of arXiv 2508.00522. The gradient is taken at ``B + Ê``; from it comes the next perturbation
    E (with A before the update and, in the second estimate, with B + Ê), B goes back to where it was,
    ``Ê ← (1 - beta)·Ê + beta·E``, the base optimizer steps, and B moves to ``B + Ê`` again.

    Between steps the weights are at the perturbed point. `eval` moves them to the unperturbed one, `train`
    back; transformers' Trainer and accelerate call both. The loss that `step` returns is the one at the
    perturbed point.

    Args:
        base_optimizer: makes the update.
        model: a model with LoRA layers that train.
        rho: radius of each new perturbation in the full space.
        beta: weight of the new perturbation in the average, in (0, 1]. The paper's text gives no value.
        norm: rho holds for all adapted matrices together (``global``) or for each (``layer``).
        factor: which factor carries the perturbation; see `flatbench.optim.base.full_space.FullSpace`.
        grad_estimate: see `flatbench.optim.base.full_space.FullSpace.perturbation`.
        every: compute a new E every k-th step; Ê stays in place between.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        InputError: the model has no LoRA layer that trains.
        ValueError: rho is negative, beta outside (0, 1], or the schedule lacks ``total_steps``.
    """

    needs_adapter: ClassVar[bool] = True

    beta: Annotated[float, Field(gt=0, le=1)] = 0.1
    factor: Factor = "B"
    grad_estimate: Estimate = "average"

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta must be in (0, 1], found {self.beta}")
        self.full_space = FullSpace(self.model, "eflat_lora", self.factor)
        #: Ê; None before the first step
        self._average: list[Tensor] | None = None
        #: what Ê becomes with the update, and whether there was no usable gradient
        self._next: tuple[list[Tensor], Tensor] | None = None
        super().__post_init__(base_optimizer)

    def _move_targets(self) -> list[Tensor]:
        return self.full_space.weights

    def _offset(self) -> list[Tensor] | None:
        return self._average  # Eq. 15 with the averaged perturbation: B moves by it, A stays

    def _observe(self) -> None:
        if self.steps % self.every:
            return
        rho = self._rho_at(self.steps)
        values, skipped = self.full_space.perturbation(rho, self.grad_estimate, self.norm)
        if self._average is not None:  # not in place: the update may fail, and the step be taken again
            # Eq. 18: Ê ← (1 - beta)·Ê + beta·E
            values = list(torch._foreach_lerp(self._average, values, self.beta))
        self._next = values, skipped

    def _after_update(self) -> None:
        if self._next is not None:
            self._average, skipped = self._next
            self.skipped_perturbations = self.skipped_perturbations + skipped
            self._next = None
        super()._after_update()

    def _forget_step(self) -> None:
        self._next = None
        super()._forget_step()

    @property
    def perturbation_norm(self) -> Tensor:
        """Norm of Ê in the full space with the factors as they are now, computed when it is asked for."""
        return self._norm if self._average is None else self.full_space.norm_of(self._average)

    def average_perturbation(self) -> list[Tensor] | None:
        """Copies of Ê in the order of ``full_space.weights``; None before the first step."""
        return None if self._average is None else [value.clone() for value in self._average]

    def fresh_perturbation(self) -> list[Tensor]:
        """E of the gradients that A and B hold now, in the order of ``full_space.weights``."""
        return self.full_space.perturbation(self.next_radius(), self.grad_estimate, self.norm)[0]

    def next_radius(self) -> float:
        """The radius of the next step's perturbation."""
        return self._rho_at(self.steps)

    def _own_state(self) -> dict[str, Any]:
        average = None if self._average is None else [value.clone() for value in self._average]
        return {**super()._own_state(), "average": average}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        stored = own["average"]
        self._average = None if stored is None else self._convert_like(stored, self.full_space.weights)
        super()._load_own_state(own)
