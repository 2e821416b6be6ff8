"""How a model is trained: one file a method, each a `torch.optim.Optimizer` around a base optimizer."""

from __future__ import annotations

from typing import Any

from flatbench.registry import Registry

REGISTRY = Registry(
    "optimizer",
    {
        "plain": "flatbench.optim.plain:Plain",
        "sam": "flatbench.optim.sam:SAM",
        "flat_lora": "flatbench.optim.flat_lora:FlatLoRA",
        "eflat_lora": "flatbench.optim.eflat_lora:EFlatLoRA",
    },
    group="flatbench.optimizers",
)

# arXiv 2508.00522 renamed its methods in v3; both names are in use.
ALIASES = {"fmlora": "flat_lora", "efmlora": "eflat_lora"}

_EXPORTS = {
    "Plain": "plain",
    "SAM": "sam",
    "FlatLoRA": "flat_lora",
    "FMLoRA": "flat_lora",
    "EFlatLoRA": "eflat_lora",
    "EFMLoRA": "eflat_lora",
}

__all__ = ["ALIASES", "REGISTRY", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return REGISTRY.load(_EXPORTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
