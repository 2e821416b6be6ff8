"""LookSAM (Liu et al. 2022, arXiv 2203.02714)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flatbench.optim.base import Norm
from flatbench.optim.base.buffers import Move, usable
from flatbench.optim.base.options import Every
from flatbench.optim.sam import SAM


@dataclass(kw_only=True, eq=False, repr=False)
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

    alpha: Annotated[float, Field(ge=0)] = 0.7
    every: Every = 5
    # no options: the paper's norms are over all parameters, and what is reused has to be the same everywhere
    norm: Norm = field(default="global", init=False)
    m_sharpness: bool = field(default=False, init=False)

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha must not be negative, found {self.alpha}")
        self._first_gradient: list[Tensor] = []
        super().__post_init__(base_optimizer)

    def _move(self) -> Move:
        self._first_gradient = self.layout.gradients()
        return self._scale_to_radius(self.layout, self._first_gradient)

    def _combine(self) -> None:
        layout = self.layout
        squared = layout.inner(self._first_gradient, self._first_gradient)
        kept = layout.gradients()
        share = torch.where(usable(squared), layout.inner(kept, self._first_gradient) / squared, 0.0)
        for perturbed, first in zip(kept, self._first_gradient, strict=True):
            perturbed.sub_(share.to(device=first.device, dtype=first.dtype) * first)
        self._memory = [torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for value in kept]
        self._first_gradient = []

    def _observe_alone(self) -> None:
        if self._memory is None:
            return
        layout = self.layout
        gradients = layout.gradients()
        kept = layout.norm(self._memory)
        factor = torch.where(usable(kept), self.alpha * layout.norm(gradients).to(kept.device) / kept, 0.0)
        for gradient, memory in zip(gradients, self._memory, strict=True):
            gradient.add_(factor.to(device=memory.device, dtype=memory.dtype) * memory)
        layout.put_gradients(gradients)
