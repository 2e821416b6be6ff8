"""Momentum-SAM (Becker et al. 2024, arXiv 2401.12033)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from flatbench.errors import InputError
from flatbench.optim.base import PerturbationOptions
from flatbench.optim.base.buffers import Buffers, scaled
from flatbench.optim.base.options import Rho
from flatbench.optim.base.two_points import Displaced

#: where torch's optimizers keep their momentum
_KEYS = ("momentum_buffer", "exp_avg")


@dataclass(kw_only=True, eq=False, repr=False)
class MomentumSAM(PerturbationOptions, Displaced):
    """MomentumSAM: the gradient at a point along the base optimizer's momentum; one gradient a step.

    As published (arXiv 2401.12033), ``ε = -rho·v/‖v‖`` with the momentum v of gradients, which is the
    direction of descent. SAM's ascent would be the other sign, ``direction: ascent``. v is the base
    optimizer's own buffer (``momentum_buffer`` or ``exp_avg``), so nothing is kept but the weights' copy.

    Between steps the weights are at the perturbed point; see `flatbench.optim.base.two_points.TwoPoints`. The
    first step, before there is momentum, is the base optimizer's.

    Args:
        base_optimizer: makes the update; it must keep a momentum.
        model: the model.
        rho: radius of the perturbation.
        direction: ``descent`` as published, or ``ascent``.
        norm: rho holds for all parameters together (``global``) or for each tensor (``layer``).
        every: perturb every k-th step only.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        InputError: the base optimizer keeps no momentum.
        ValueError: rho is negative, or the schedule lacks ``total_steps``.
    """

    #: what a study calls it, for messages
    called: ClassVar[str] = "msam"

    rho: Rho = 0.3
    direction: Literal["descent", "ascent"] = "descent"

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if self.direction not in ("descent", "ascent"):
            raise ValueError(f"unknown direction '{self.direction}'; known: descent, ascent")
        groups = base_optimizer.param_groups
        if not any(group.get("momentum") or group.get("betas", (0.0,))[0] for group in groups):
            raise InputError(
                f"{self.called} perturbs along the base optimizer's momentum, and "
                f"{type(base_optimizer).__name__} keeps none; give SGD a momentum, or use Adam or AdamW"
            )
        self.sign = -1.0 if self.direction == "descent" else 1.0
        self._skip: Tensor | int = 0
        super().__post_init__(base_optimizer)

    def _offset(self) -> list[Tensor] | None:
        self._skip = 0
        if self.steps % self.every:
            return None
        layout = self.layout
        buffers = self._momentum(layout)
        if buffers is None:
            return None
        move = scaled(
            layout, buffers, self.sign * self._fixed_radius(self._rho_at(self.steps)), self.norm == "layer"
        )
        self._norm, self._skip = move.norm, move.skipped
        return move.values

    def _momentum(self, layout: Buffers) -> list[Tensor] | None:
        found = []
        for parameter in layout.parameters:
            state = self.base.state.get(parameter, {})
            found.append(next((state[key] for key in _KEYS if state.get(key) is not None), None))
        if any(value is not None for value in found):
            return layout.flatten(found)
        if self.steps and any(p.grad is not None for p in layout.parameters):
            raise InputError(
                f"{self.called} perturbs along the base optimizer's momentum, and {type(self.base).__name__} "
                f"keeps none under a name known here ({', '.join(_KEYS)}); use SGD with momentum, Adam or "
                "AdamW"
            )
        return None

    def _after_update(self) -> None:
        self.train()
        self.skipped_perturbations = self.skipped_perturbations + self._skip
