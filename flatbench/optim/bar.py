"""Balancedness-aware regularization, oBAR and nBAR (Li et al. 2024, arXiv 2410.14802)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim.base import Radius, RhoSchedule, WrappedOptimizer, lr_share
from flatbench.optim.base.buffers import Buffers, total_norm, usable
from flatbench.optim.base.options import TotalSteps


class BAR(WrappedOptimizer):
    """Scales the two factors of every layer against each other before the base optimizer's step.

    Args:
        base_optimizer: makes the update.
        model: a model with LoRA layers whose factors train.
        alpha: strength of the balancing.
        alpha_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        InputError: the model has no LoRA layer that trains, or a factor is frozen.
        ValueError: alpha is negative, or the schedule lacks ``total_steps``.
    """

    needs_adapter = True
    writes_weights: ClassVar[bool] = True
    #: what a study calls it, for messages
    name: ClassVar[str]

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        alpha: Annotated[float, Field(ge=0)] = 0.25,
        alpha_schedule: RhoSchedule = "linear",
        total_steps: TotalSteps = None,
    ) -> None:
        self.strength = Radius(alpha, alpha_schedule, total_steps, "alpha")
        factors = lora_factors(model)
        if not factors:
            raise InputError(f"{self.name} balances LoRA's factors, and no LoRA layer of the model trains")
        for f in factors:
            if not (f.A.requires_grad and f.B.requires_grad):
                letter = "B" if f.A.requires_grad else "A"
                raise InputError(f"{self.name} balances both factors, and {letter} of {f.name} is frozen")
        # all B first: the halves of a vector with a number for each are those of x = B and y = A
        self._factors: list[Tensor] = [*(f.B for f in factors), *(f.A for f in factors)]
        self._buffers: Buffers | None = None
        #: the factors before the step that is under way
        self._undo: list[Tensor] | None = None
        self._membership: tuple[list[int], list[Tensor]] | None = None
        super().__init__(base_optimizer, model)

    @property
    def layout(self) -> Buffers:
        """All factors, laid end to end."""
        if self._buffers is None or not self._buffers.fits(self._factors):
            self._buffers, self._membership = Buffers(self._factors), None
        return self._buffers

    @abstractmethod
    def _compare(self, layout: Buffers) -> tuple[Tensor, Tensor]:
        """Which B shrinks and its A grows, ``(layers,)`` bool; the reverse elsewhere. And whether at all."""

    @staticmethod
    def _norms(layout: Buffers, buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Norms of what belongs to each B and each A, ``(layers,)`` both."""
        x, y = layout.in_order(layout.norms(buffers)).chunk(2)
        return x, y

    def _before_update(self) -> None:
        super()._before_update()
        layout = self.layout
        alpha = self.strength.at(self.steps, lr_share(self.param_groups))
        down, applies = self._compare(layout)
        x, y = torch.where(self._among_moving(applies), alpha * self._learning_rates(), 0.0).chunk(2)
        factors = torch.cat([torch.where(down, 1 - x, 1 + x), torch.where(down, 1 + y, 1 - y)])
        self._undo, weights = layout.weights(), layout.weights()
        for weight, factor in zip(weights, layout.spread(layout.by_kind(factors)), strict=True):
            weight.mul_(factor)
        layout.copy_(weights)

    def _among_moving(self, applies: Tensor) -> Tensor:
        """``applies``, or for B and A, ``(2·layers,)``, without the layers that take no part in this step.

        A factor of theirs was frozen since, or the loss did not reach it.
        """
        moving = [p.requires_grad and p.grad is not None for p in self._factors]
        if all(moving):  # nothing is copied to the device
            return applies
        count = len(moving) // 2
        both = [b and a for b, a in zip(moving[:count], moving[count:], strict=True)]
        return applies & torch.tensor([*both, *both], device=applies.device)

    def _after_update(self) -> None:
        self._undo = None

    def _forget_step(self) -> None:
        if self._undo is not None:
            self.layout.copy_(self._undo)
            self._undo = None

    def _learning_rates(self) -> Tensor:
        """The learning rate of every factor's parameter group, ``(2·layers,)``."""
        groups = [{id(p) for p in group["params"]} for group in self.param_groups]
        sizes = [len(group) for group in groups]
        if self._membership is None or self._membership[0] != sizes:  # copied to the device only then
            home = self._factors[0].device
            wide = torch.promote_types(self._factors[0].dtype, torch.float32)
            marks = [[float(id(p) in g) for p in self._factors] for g in groups]
            self._membership = sizes, [torch.tensor(mark, dtype=wide, device=home) for mark in marks]
        shares = zip(self.param_groups, self._membership[1], strict=True)
        return torch.stack([group["lr"] * mark for group, mark in shares]).sum(0)


class OBAR(BAR):
    """oBAR: the larger of a layer's B and A shrinks and the smaller grows, by alpha·lr, before each update.

    The overparametrised case of arXiv 2410.14802: with ``‖B‖ ≥ ‖A‖``, B is multiplied by
    ``1 - alpha·lr`` and A by ``1 + alpha·lr``; otherwise the reverse. Arguments are those of `BAR`.
    """

    name = "obar"

    def _compare(self, layout: Buffers) -> tuple[Tensor, Tensor]:
        x, y = self._norms(layout, layout.weights())
        return x >= y, torch.isfinite(x).all() & torch.isfinite(y).all()


class NBAR(BAR):
    """nBAR: the factor with the smaller gradient shrinks and the other grows, by alpha·lr, before an update.

    The non-overparametrised case of arXiv 2410.14802: with ``‖g_B‖ ≥ ‖g_A‖``, B is multiplied
    by ``1 + alpha·lr`` and A by ``1 - alpha·lr``; otherwise the reverse. With gradients that are all zero or
    not finite nothing is scaled, and the step is counted in ``skipped_perturbations``. Arguments are those of
    `BAR`.
    """

    name = "nbar"

    def _compare(self, layout: Buffers) -> tuple[Tensor, Tensor]:
        x, y = self._norms(layout, layout.gradients())
        says_something = usable(total_norm([x, y]))
        self.skipped_perturbations = self.skipped_perturbations + ~says_something
        return x < y, says_something
