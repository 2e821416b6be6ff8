"""Loss landscapes: slices and planes through a checkpoint's weights, their cost kept low, their figures.

Names are loaded when they are used: the figures need no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "landscape": "explore",
    "Landscape": "result",
    "Axes": "axes",
    "Random": "axes",
    "Hessian": "axes",
    "Gradient": "axes",
    "Line": "axes",
    "Trajectory": "axes",
    "plot_slice": "figures",
    "plot_plane": "figures",
    "plot_surface": "figures",
    "plot_surface_plotly": "figures",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
