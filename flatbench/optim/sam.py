"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from flatbench.config.registry import LATER
from flatbench.optim.base import PerturbationOptions, TwoGradients
from flatbench.optim.base.buffers import Buffers, Move, scaled


@dataclass(kw_only=True, eq=False, repr=False)
class SAM(PerturbationOptions, TwoGradients):
    """SAM: the gradient at w + rho·g/‖g‖; on an adapter's A and B this is LoRA-SAM.

    The norm is taken over all trainable parameters that have a gradient (Eq. 2 of arXiv 2010.01412). With
    an adapter the perturbation of the merged weight is ``s·(B·E_A + E_B·A + E_B·E_A)``.

    Args:
        base_optimizer: makes the update with the second gradient.
        model: the model; its batch normalisation moves its statistics in the first pass only.
        rho: radius of the perturbation.
        norm: rho holds for all parameters together (``global``) or for each tensor (``layer``).
        every: perturb every k-th step only; the steps between are the base optimizer's own.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.
        m_sharpness: each of several processes perturbs by its own part of the batch; see
            `flatbench.optim.base.TwoGradients`.

    Raises:
        ValueError: rho is negative, or the schedule lacks ``total_steps``.
    """

    m_sharpness: Annotated[bool, LATER] = False

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        self._buffers: Buffers | None = None
        #: what a variant keeps from step to step, in the layout's buffers
        self._memory: list[Tensor] | None = None
        super().__post_init__(base_optimizer)

    @property
    def layout(self) -> Buffers:
        """All parameters of the base optimizer, laid end to end."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        if self._buffers is None or not self._buffers.fits(parameters):
            old, self._buffers = self._buffers, Buffers(parameters)
            if old is not None and self._memory is not None:  # parameters were added, or moved elsewhere
                kept = {id(p): v for p, v in zip(old.parameters, old.unflatten(self._memory), strict=True)}
                self._memory = self._buffers.flatten(
                    [v if (v := kept.get(id(p))) is None else v.to(p.device) for p in parameters]
                )
        return self._buffers

    def _move(self) -> Move:
        layout = self.layout
        return self._scale_to_radius(layout, layout.gradients())

    def _scale_to_radius(
        self, layout: Buffers, direction: list[Tensor], measured_by: list[Tensor] | None = None
    ) -> Move:
        return scaled(layout, direction, self._rho_at(self.steps), self.norm == "layer", measured_by)

    def _own_state(self) -> dict[str, Any]:
        if self._memory is None:
            return {"memory": None}
        return {"memory": [value.clone() for value in self.layout.unflatten(self._memory)]}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        stored, layout = own["memory"], self.layout
        if stored is None:
            self._memory = None
            return
        pairs = zip(stored, layout.parameters, strict=True)
        self._memory = layout.flatten([value.to(p.device) for value, p in pairs])
