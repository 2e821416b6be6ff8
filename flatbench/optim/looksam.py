"""LookSAM (Liu et al. 2022, arXiv 2203.02714)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.optim.base import RhoSchedule
from flatbench.optim.base.buffers import Move, usable
from flatbench.optim.sam import SAM


class LookSAM(SAM):
    """LookSAM: SAM every k-th step; the steps between reuse the part of its gradient that changes slowly.

    arXiv 2203.02714. Every ``every``-th step is SAM's, and keeps the part of its gradient g_s
    that is orthogonal to the plain gradient g, ``g_v = g_s - <g_s, g>/‖g‖²·g``. The steps between take one
    gradient and step with ``g + alpha·‖g‖/‖g_v‖·g_v``. Norms are over all parameters.

    Args:
        base_optimizer: makes the update.
        model: the model; its batch normalisation moves its statistics in the first pass only.
        rho: radius of the perturbation.
        alpha: weight of the reused part.
        every: the paper's k, steps between two gradients of SAM.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        ValueError: rho or alpha is negative, or the schedule lacks ``total_steps``.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        rho: Annotated[float, Field(ge=0)] = 0.05,
        alpha: Annotated[float, Field(ge=0)] = 0.7,
        every: Annotated[int, Field(ge=1)] = 5,
        rho_schedule: RhoSchedule = "constant",
        total_steps: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha must not be negative, found {alpha}")
        self.alpha = alpha
        self._first: list[Tensor] = []
        super().__init__(
            base_optimizer, model, rho=rho, every=every, rho_schedule=rho_schedule, total_steps=total_steps
        )

    def _move(self) -> Move:
        self._first = self.layout.gradients()
        return self._scaled(self.layout, self._first)

    def _combine(self) -> None:
        layout = self.layout
        squared = layout.inner(self._first, self._first)
        kept = layout.gradients()
        share = torch.where(usable(squared), layout.inner(kept, self._first) / squared, 0.0)
        for perturbed, first in zip(kept, self._first, strict=True):
            perturbed.sub_(share.to(device=first.device, dtype=first.dtype) * first)
        self._memory = [torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for value in kept]
        self._first = []

    def _alone(self) -> None:
        if self._memory is None:
            return
        layout = self.layout
        gradients = layout.gradients()
        kept = layout.norm(self._memory)
        factor = torch.where(usable(kept), self.alpha * layout.norm(gradients).to(kept.device) / kept, 0.0)
        for gradient, memory in zip(gradients, self._memory, strict=True):
            gradient.add_(factor.to(device=memory.device, dtype=memory.dtype) * memory)
        layout.put_gradients(gradients)
