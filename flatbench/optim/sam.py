"""Sharpness-aware minimization (Foret et al. 2021, arXiv 2010.01412)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.optim.base import Radius, RhoSchedule, TwoGradients


class SAM(TwoGradients):
    """SAM: the gradient at w + rho·g/‖g‖; on an adapter's A and B this is LoRA-SAM.

    The norm is taken over all trainable parameters that have a gradient (Eq. 2 of arXiv 2010.01412). With
    an adapter the perturbation of the merged weight is ``s·(B·E_A + E_B·A + E_B·E_A)``.

    Args:
        base_optimizer: makes the update with the second gradient.
        model: the model; its batch normalisation moves its statistics in the first pass only.
        rho: radius of the perturbation.
        rho_schedule: see `flatbench.optim.base.Radius`.
        total_steps: steps of the whole training, for the schedules that need it.

    Raises:
        ValueError: rho is negative, or the schedule lacks ``total_steps``.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        rho: Annotated[float, Field(ge=0)] = 0.05,
        rho_schedule: RhoSchedule = "constant",
        total_steps: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        self.radius = Radius(rho, rho_schedule, total_steps)
        super().__init__(base_optimizer, model)

    def _perturb(self) -> tuple[list[Tensor], list[Tensor]]:
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in weights]
        rho = self.radius.at(self.steps)
        norm = _norm(gradients)
        if not (torch.isfinite(norm) and norm > 0):
            self.skipped_perturbations += 1
            self.perturbation_norm = torch.zeros_like(norm)
            return [], []
        copies = [weight.clone() for weight in weights]
        torch._foreach_add_(weights, torch._foreach_mul(gradients, rho / norm))
        self.perturbation_norm = torch.full_like(norm, rho)
        return weights, copies


def _norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, in float32 at least."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm([t.float() if t.dtype.itemsize < 4 else t for t in tensors])
    return torch.linalg.vector_norm(torch.stack([norm.to(tensors[0].device) for norm in norms]))
