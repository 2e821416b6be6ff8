"""What every training method shares."""

from __future__ import annotations

from flatbench.optim.base.two_gradients import (
    Closure,
    Norm,
    Radius,
    RhoSchedule,
    TwoGradients,
    WrappedOptimizer,
    lr_share,
)

__all__ = [
    "Closure",
    "Norm",
    "Radius",
    "RhoSchedule",
    "TwoGradients",
    "WrappedOptimizer",
    "lr_share",
]
