"""Surrogate gap guided sharpness-aware minimization (Zhuang et al. 2022, arXiv 2203.08065)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flatbench.optim.base import RhoSchedule
from flatbench.optim.base.buffers import Move, usable
from flatbench.optim.sam import SAM


@dataclass(kw_only=True, eq=False, repr=False)
class GSAM(SAM):
    """GSAM: SAM's gradient minus alpha times the part of the plain gradient that is orthogonal to it.

    arXiv 2203.08065: the update's gradient is ``g_p - alpha·(g - <g, g_p>/‖g_p‖²·g_p)``, with
    g the gradient at w and g_p the one at w + ε, which also lowers the gap between the two losses. rho
    follows the learning rate.

    Args:
        base_optimizer: makes the update with the combined gradient.
        model: the model; its batch normalisation moves its statistics in the first pass only.
        rho: largest radius of the perturbation.
        alpha: weight of the orthogonal part.
        norm: rho holds for all parameters together (``global``) or for each tensor (``layer``).
        every: perturb every k-th step only.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.
        m_sharpness: each of several processes perturbs by its own part of the batch; see
            `flatbench.optim.base.TwoGradients`.

    Raises:
        ValueError: rho or alpha is negative, or the schedule lacks ``total_steps``.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.4
    rho_schedule: RhoSchedule = "lr"

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
        second = layout.gradients()
        squared, along_both = layout.inner(second, second), layout.inner(self._first_gradient, second)
        share = torch.where(usable(squared), along_both.to(squared.device) / squared, 0.0)
        for first, perturbed in zip(self._first_gradient, second, strict=True):
            along = share.to(device=perturbed.device, dtype=perturbed.dtype) * perturbed
            perturbed.sub_(first.sub_(along), alpha=self.alpha)
        layout.put_gradients(second)
        self._first_gradient = []
