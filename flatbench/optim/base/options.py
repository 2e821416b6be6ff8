"""The options that perturbing methods share, each with its type, bounds and default in one place.

They are fields of a dataclass, whose generated constructor a study's schema reads like any other. A method
declares the fields that it adds, sets another default by declaring a field again, and takes an option away
with ``field(init=False)``.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from flatbench.optim.base.radius import Norm, Radius, RhoSchedule, lr_share
from flatbench.optim.base.wrapped import WrappedOptimizer

Rho = Annotated[float, Field(ge=0)]
Every = Annotated[int, Field(ge=1)]
TotalSteps = Annotated[int, Field(ge=1)] | None


# compared and shown as every torch optimizer is, not by the values of the fields
@dataclass(eq=False, repr=False)
class RadiusOptions(WrappedOptimizer):
    """A method with a radius that may change over training.

    Args:
        base_optimizer: makes the update.
        model: the model.
        rho: radius of the perturbation.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        ValueError: rho is negative, or the schedule lacks ``total_steps``.
    """

    base_optimizer: InitVar[torch.optim.Optimizer]
    model: nn.Module
    _: KW_ONLY
    rho: Rho = 0.05
    rho_schedule: RhoSchedule = "constant"
    total_steps: TotalSteps = None

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        self.radius = Radius(self.rho, self.rho_schedule, self.total_steps)
        # of the class beside this one, `TwoGradients` or `TwoPoints`
        super().__init__(base_optimizer, self.model)

    def _rho_at(self, step: int) -> float:
        """The radius of a step, counted from 0."""
        return self.radius.at(step, lr_share(self.param_groups))


@dataclass(kw_only=True, eq=False, repr=False)
class PerturbationOptions(RadiusOptions):
    """A method that moves the weights by a perturbation of that radius.

    Args:
        norm: rho holds for all that is perturbed together (``global``) or for each tensor or matrix of it
            (``layer``).
        every: perturb every k-th step only.

    Raises:
        ValueError: ``every`` is below 1, and what `RadiusOptions` raises.
    """

    norm: Norm = "global"
    every: Every = 1

    def __post_init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, found {self.every}")
        super().__post_init__(base_optimizer)
