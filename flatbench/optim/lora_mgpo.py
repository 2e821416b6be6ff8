"""LoRA-MGPO: LoRA's factors perturbed along the momentum (arXiv 2502.14538)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim.base.options import Rho
from flatbench.optim.base.radius import Norm
from flatbench.optim.msam import MomentumSAM


@dataclass(kw_only=True, eq=False, repr=False)
class LoRAMGPO(MomentumSAM):
    """LoRA-MGPO: one gradient, at a point up the momentum that is nearer the larger gradients have been.

    With m the base optimizer's momentum of A and B, and norms over all of them together (arXiv 2502.14538):
    ``ε_t = rho·m_{t-1}/‖m_{t-1}‖/ḡ_{t-1}``, the gradient g_t is taken at ``(A, B) + ε_t`` and updates weights
    and momentum at the weights themselves, and ``ḡ_t = beta·ḡ_{t-1} + (1 - beta)·‖g_t‖``. The first step,
    which has no momentum, is the base optimizer's; ḡ begins with its gradient's norm, because the source read
    here does not say with what.

    Between steps the weights are at the perturbed point; see `flatbench.optim.base.two_points.TwoPoints`.

    Args:
        base_optimizer: makes the update; it must keep a momentum.
        model: a model with LoRA layers that train; what else trains is not perturbed.
        rho: radius of the perturbation at a mean gradient norm of 1; the paper's 0.05 is for GLUE, and 0.01
            for generation.
        beta: weight of the old in the mean of gradient norms; the paper's 0.9 is for GLUE, and 0.8 for
            generation.
        every: perturb every k-th step only.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        InputError: the base optimizer keeps no momentum, or no LoRA layer of the model trains.
        ValueError: rho is negative, beta outside [0, 1), or the schedule lacks ``total_steps``.
    """

    needs_adapter: ClassVar[bool] = True
    called: ClassVar[str] = "lora_mgpo"

    rho: Rho = 0.05
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    direction: Literal["descent", "ascent"] = field(default="ascent", init=False)
    norm: Norm = field(default="global", init=False)

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), found {self.beta}")
        factors = [p for f in lora_factors(self.model) for p in (f.B, f.A) if p.requires_grad]
        if not factors:
            raise InputError("lora_mgpo perturbs LoRA's factors, and no LoRA layer of the model trains")
        self._factors: list[Tensor] = list({id(p): p for p in factors}.values())
        #: ḡ, and what it becomes with the update
        self._mean: Tensor | None = None
        self._next_mean: Tensor | None = None
        super().__post_init__(base_optimizer)

    def _move_targets(self) -> list[Tensor]:
        return self._factors

    def _offset(self) -> list[Tensor] | None:
        values = super()._offset()
        if values is None or self._mean is None:
            return None
        # at a mean of zero nothing is known, and nothing is perturbed
        share = torch.where(self._mean > 0, 1 / self._mean, 0.0)
        self._norm = self._norm * share.to(self._norm)
        return [value * share.to(value) for value in values]

    def _observe(self) -> None:
        layout = self.layout
        length = layout.norm(layout.gradients())
        before = length if self._mean is None else self._mean
        mean = self.beta * before + (1 - self.beta) * length
        # one useless gradient must not spoil all that follow
        self._next_mean = torch.where(torch.isfinite(length), mean, before)

    def _after_update(self) -> None:
        if self._next_mean is not None:
            self._mean, self._next_mean = self._next_mean, None
        super()._after_update()

    def _forget_step(self) -> None:
        self._next_mean = None
        super()._forget_step()

    def _own_state(self) -> dict[str, Any]:
        mean = None if self._mean is None else self._mean.clone()
        return {**super()._own_state(), "mean_norm": mean}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        stored = own["mean_norm"]
        self._mean = None if stored is None else stored.to(self._factors[0].device)
        super()._load_own_state(own)
