"""The base optimizer alone, behind the same interface as the methods."""

from __future__ import annotations

from typing import ClassVar

from flatbench.optim.base import WrappedOptimizer


class Plain(WrappedOptimizer):
    """The base optimizer alone: LoRA with an adapter, full fine-tuning without."""

    hands_closure_on: ClassVar[bool] = True
