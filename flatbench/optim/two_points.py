"""The public place of `flatbench.optim.base.two_points`, for plug-ins."""

from __future__ import annotations

from flatbench.optim.base.two_points import Displaced, TwoPoints

__all__ = ["Displaced", "TwoPoints"]
