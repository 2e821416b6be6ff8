"""Adaptive sharpness-aware minimization (Kwon et al. 2021, arXiv 2102.11600)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from flatbench.optim.base.buffers import Buffers, Move
from flatbench.optim.base.options import Rho
from flatbench.optim.sam import SAM


@dataclass(kw_only=True, eq=False, repr=False)
class ASAM(SAM):
    """ASAM: SAM in a ball that scales with the weights, ``ε = rho·T²g/‖T·g‖`` with ``T = |w| + eta``.

    T is elementwise (arXiv 2102.11600). With eta = 0 an adapter at its start would not be perturbed at
    all: B = 0 gives T = 0 for B, and A has no gradient.

    Args:
        base_optimizer: makes the update with the second gradient.
        model: the model; its batch normalisation moves its statistics in the first pass only.
        rho: radius in the scaled space.
        eta: added to the weights' absolute values.
        scale_vectors: scale biases and normalisation weights too; if not, they have T = 1, as in the
            authors' code.
        norm: rho holds for all parameters together (``global``) or for each tensor (``layer``).
        every: perturb every k-th step only.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.
        m_sharpness: each of several processes perturbs by its own part of the batch; see
            `flatbench.optim.base.TwoGradients`.

    Raises:
        ValueError: rho or eta is negative, or the schedule lacks ``total_steps``.
    """

    rho: Rho = 0.5
    eta: Annotated[float, Field(ge=0)] = 0.01
    scale_vectors: bool = True

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if not self.eta >= 0:
            raise ValueError(f"eta must not be negative, found {self.eta}")
        self._unscaled_entries: tuple[Buffers, list[Tensor]] | None = None
        super().__post_init__(base_optimizer)

    def _move(self) -> Move:
        layout = self.layout
        scale = [weight.abs_().add_(self.eta) for weight in layout.weights()]
        if not self.scale_vectors:
            scale = [
                torch.where(vector, 1.0, t) for t, vector in zip(scale, self._vectors(layout), strict=True)
            ]
        lengths = torch._foreach_mul(scale, layout.gradients())
        return self._scale_to_radius(layout, list(torch._foreach_mul(scale, lengths)), list(lengths))

    def _vectors(self, layout: Buffers) -> list[Tensor]:
        """Which entries of the buffers belong to vectors."""
        if self._unscaled_entries is None or self._unscaled_entries[0] is not layout:
            marks = [torch.full_like(p, float(p.ndim < 2)) for p in layout.parameters]
            self._unscaled_entries = layout, [mark.bool() for mark in layout.flatten(marks)]
        return self._unscaled_entries[1]
