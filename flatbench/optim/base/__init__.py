"""Shared parts of the training methods."""

from __future__ import annotations

from flatbench.optim.base.options import PerturbationOptions, RadiusOptions
from flatbench.optim.base.radius import Norm, Radius, RhoSchedule, lr_share
from flatbench.optim.base.two_gradients import TwoGradients
from flatbench.optim.base.wrapped import Closure, WrappedOptimizer

__all__ = [
    "Closure",
    "Norm",
    "PerturbationOptions",
    "Radius",
    "RadiusOptions",
    "RhoSchedule",
    "TwoGradients",
    "WrappedOptimizer",
    "lr_share",
]
