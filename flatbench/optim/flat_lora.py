"""Flat-LoRA, called FMLoRA in the paper's later version (arXiv 2508.00522)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from flatbench.config.registry import LATER
from flatbench.optim.base import PerturbationOptions, TwoGradients
from flatbench.optim.base.buffers import Buffers, Move
from flatbench.optim.base.full_space import Estimate, Factor, FullSpace


@dataclass(kw_only=True, eq=False, repr=False)
class FlatLoRA(PerturbationOptions, TwoGradients):
    """Flat-LoRA (FMLoRA): SAM's perturbation in the full weight space, transferred to B alone.

    The full-space gradient is estimated from LoRA's own (arXiv 2508.00522: Eq. 10 and Eq. 11, their mean
    Eq. 12), scaled to rho (Eq. 13, with g/‖g‖ as in the paper's proofs), and transferred to
    ``E_B = (1/s)·E_W·A⁺`` (Eq. 14); B moves by it and A stays (Eq. 15), so that the merged weight
    moves by E_W projected onto A's row space. Parameters outside of LoRA (a new head) are trained and not
    perturbed.

    Args:
        base_optimizer: makes the update with the second gradient.
        model: a model with LoRA layers that train.
        rho: radius in the full space.
        norm: rho holds for all adapted matrices together (``global``) or for each (``layer``).
        factor: which factor carries the perturbation; see `flatbench.optim.base.full_space.FullSpace`.
        grad_estimate: see `flatbench.optim.base.full_space.FullSpace.perturbation`.
        every: perturb every k-th step only; the steps between are the base optimizer's own.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.
        m_sharpness: each of several processes perturbs by its own part of the batch; see
            `flatbench.optim.base.TwoGradients`.

    Raises:
        InputError: the model has no LoRA layer that trains.
        ValueError: rho is negative, or the schedule lacks ``total_steps``.
    """

    needs_adapter: ClassVar[bool] = True

    factor: Factor = "B"
    grad_estimate: Estimate = "average"
    m_sharpness: Annotated[bool, LATER] = False

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        self.full_space = FullSpace(self.model, "flat_lora", self.factor)
        self._buffers: Buffers | None = None
        super().__post_init__(base_optimizer)

    def _move(self) -> Move:
        weights = self.full_space.weights
        if self._buffers is None or not self._buffers.fits(weights):
            self._buffers = Buffers(weights)
        rho = self._rho_at(self.steps)
        values, skipped = self.full_space.perturbation(rho, self.grad_estimate, self.norm)
        # Eq. 15: the second gradient is taken at B + E_B, with A as it is
        return Move(self._buffers, values, self.full_space.norm_of(values), skipped)
