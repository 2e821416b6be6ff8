"""The base optimizer alone, behind the same interface as the methods."""

from __future__ import annotations

from typing import Any

import torch

from flatbench.optim.base import Closure, WrappedOptimizer


class Plain(WrappedOptimizer):
    """The base optimizer alone: LoRA with an adapter, full fine-tuning without."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update; returns the closure's loss if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.base.step()
        self.steps += 1
        return loss
