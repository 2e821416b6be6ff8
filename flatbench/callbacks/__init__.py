"""Sharpness inside somebody else's training: a callback, and the same for plain loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatbench.config.lazy import lazy_names

if TYPE_CHECKING:
    from flatbench.callbacks.lightning import LightningSharpness
    from flatbench.callbacks.trainer import SharpnessCallback
    from flatbench.callbacks.watch import SharpnessWatch

__all__ = ["LightningSharpness", "SharpnessCallback", "SharpnessWatch"]

__getattr__ = lazy_names(
    __name__,
    {
        "LightningSharpness": "flatbench.callbacks.lightning:LightningSharpness",
        "SharpnessCallback": "flatbench.callbacks.trainer:SharpnessCallback",
        "SharpnessWatch": "flatbench.callbacks.watch:SharpnessWatch",
    },
)
