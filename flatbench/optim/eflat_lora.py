"""EFlat-LoRA, called EFMLoRA in the paper's later version (arXiv 2508.00522)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.optim.base import Closure, Radius, RhoSchedule, WrappedOptimizer
from flatbench.optim.full_space import Estimate, FullSpace, Norm


class EFlatLoRA(WrappedOptimizer):
    """EFlat-LoRA (EFMLoRA): Flat-LoRA with one gradient a step and a moving average of perturbations.

    Algorithm 2 of arXiv 2508.00522. The gradient is taken at ``B + Ê``; from it comes the next perturbation
    E (with A before the update and, in the second estimate, with B + Ê), B goes back to where it was,
    ``Ê ← (1 - beta)·Ê + beta·E``, the base optimizer steps, and B moves to ``B + Ê`` again.

    Between steps the weights are at the perturbed point. `eval` moves them to the unperturbed one, `train`
    back; transformers' Trainer and accelerate call both. The loss that `step` returns is the one at the
    perturbed point.

    Args:
        base_optimizer: makes the update.
        model: a model with LoRA layers that train.
        rho: radius of each new perturbation in the full space.
        beta: weight of the new perturbation in the average, in (0, 1]. The paper's text gives no value.
        norm: rho holds for all adapted matrices together (``global``) or for each (``layer``).
        grad_estimate: see `flatbench.optim.full_space.FullSpace.perturbation`.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        InputError: the model has no LoRA layer that trains.
        ValueError: rho is negative, beta outside (0, 1], or the schedule lacks ``total_steps``.
    """

    needs_adapter = True

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        rho: Annotated[float, Field(ge=0)] = 0.05,
        beta: Annotated[float, Field(gt=0, le=1)] = 0.1,
        norm: Norm = "global",
        grad_estimate: Estimate = "average",
        rho_schedule: RhoSchedule = "constant",
        total_steps: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        if not 0 < beta <= 1:
            raise ValueError(f"beta must be in (0, 1], found {beta}")
        self.radius = Radius(rho, rho_schedule, total_steps)
        self.beta = beta
        self.norm: Norm = norm
        self.grad_estimate: Estimate = grad_estimate
        self.full_space = FullSpace(model, "eflat_lora")
        self.weights: list[Tensor] = [factor.B for factor in self.full_space.factors]
        self._perturbed = False
        #: B where it was before the perturbation; kept, because subtracting would drift
        self._clean: list[Tensor] | None = None
        #: Ê; None before the first step
        self._average: list[Tensor] | None = None
        super().__init__(base_optimizer, model)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update with the gradients at the perturbed point: the closure's, or those that are there."""
        loss = None
        if closure is not None:
            self.train()
            with torch.enable_grad():
                loss = closure()
        new = self.full_space.perturbation(self.radius.at(self.steps), self.grad_estimate, self.norm)
        self.eval()
        if self._average is None:
            self._average = new.values
        else:
            torch._foreach_lerp_(self._average, new.values, self.beta)
        self.base.step()
        self.steps += 1
        self.skipped_perturbations = self.skipped_perturbations + new.skipped
        self.perturbation_norm = self.full_space.norm_of(self._average)
        self.train()
        return loss

    @torch.no_grad()
    def train(self) -> None:
        """Move B to ``B + Ê``."""
        if self._perturbed or self._average is None:
            return
        if self._clean is None:
            self._clean = [weight.clone() for weight in self.weights]
        else:
            torch._foreach_copy_(self._clean, self.weights)
        torch._foreach_add_(self.weights, self._average)
        self._perturbed = True

    @torch.no_grad()
    def eval(self) -> None:
        """Move B back to the unperturbed point, bit by bit."""
        if self._perturbed and self._clean is not None:
            torch._foreach_copy_(self.weights, self._clean)
            self._perturbed = False

    def _own_state(self) -> dict[str, Any]:
        clean = self._clean if self._perturbed else self.weights
        return {
            "perturbed": self._perturbed,
            "clean": [weight.detach().clone() for weight in clean or ()],
            "average": None if self._average is None else [value.clone() for value in self._average],
        }

    @torch.no_grad()
    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        # B itself is put back too: a model file may have been written at the perturbed point
        self._perturbed = False
        torch._foreach_copy_(
            self.weights, [_like(t, w) for t, w in zip(own["clean"], self.weights, strict=True)]
        )
        stored = own["average"]
        self._average = (
            None if stored is None else [_like(t, w) for t, w in zip(stored, self.weights, strict=True)]
        )
        if own["perturbed"]:
            self.train()


def _like(stored: Tensor, weight: Tensor) -> Tensor:
    return stored.detach().to(device=weight.device, dtype=weight.dtype, copy=True)
