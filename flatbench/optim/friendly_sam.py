"""Friendly sharpness-aware minimization (Li et al. 2024, arXiv 2403.12350)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flatbench.optim.base.buffers import Move
from flatbench.optim.sam import SAM


@dataclass(kw_only=True, eq=False, repr=False)
class FriendlySAM(SAM):
    """FriendlySAM: SAM along ``g - sigma·m``, the batch's own part of the gradient.

    m stands for the full-batch gradient: a moving average of the earlier steps' gradients,
    ``m ← beta·m + (1 - beta)·g``, beginning with the first one, in whose step the perturbation is SAM's (as
    in the authors' code; with sigma = 1 the direction is the same as with an m that holds g already).

    Args:
        base_optimizer: makes the update with the second gradient.
        model: the model; its batch normalisation moves its statistics in the first pass only.
        rho: radius of the perturbation.
        sigma: how much of the average is taken off.
        beta: the paper's lambda, weight of the old average, in [0, 1).
        norm: rho holds for all parameters together (``global``) or for each tensor (``layer``).
        every: perturb every k-th step only; the average moves in every step.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        ValueError: rho or sigma is negative, beta outside [0, 1), or the schedule lacks ``total_steps``.
    """

    sigma: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    # no option: the average stands for the gradient of all data, and a process's own would not
    m_sharpness: bool = field(default=False, init=False)

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if not self.sigma >= 0:
            raise ValueError(f"sigma must not be negative, found {self.sigma}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), found {self.beta}")
        super().__post_init__(base_optimizer)
        #: the average before the step that is under way
        self._undo: tuple[list[Tensor] | None] | None = None

    def _move(self) -> Move:
        return self._scale_to_radius(self.layout, self._batch_component())

    def _observe_alone(self) -> None:
        self._batch_component()

    def _after_update(self) -> None:
        self._undo = None
        super()._after_update()

    def _forget_step(self) -> None:
        if self._undo is not None:
            self._memory, self._undo = self._undo[0], None
        super()._forget_step()

    def _batch_component(self) -> list[Tensor]:
        """``g - sigma·m``; then m takes g in, unless g is not finite."""
        gradients = self.layout.gradients()
        self._undo = (self._memory,)
        if self._memory is None:
            self._memory = [torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0) for g in gradients]
            return gradients
        reduced = torch._foreach_sub(gradients, torch._foreach_mul(self._memory, self.sigma))
        # not in place: the second pass may fail, and the step be taken again
        self._memory = [
            memory.lerp(torch.where(torch.isfinite(gradient), gradient, memory), 1 - self.beta)
            for memory, gradient in zip(self._memory, gradients, strict=True)
        ]
        return list(reduced)
