"""Loss landscapes: slices and planes through a checkpoint's weights, their cost kept low, their figures.

Names are loaded when they are used: the figures need no torch.
"""

from __future__ import annotations

from flatbench.config.lazy import lazy_names

_PLACES = {
    "landscape": "flatbench.landscape.explore:landscape",
    "Landscape": "flatbench.landscape.result:Landscape",
    "Axes": "flatbench.landscape.axes:Axes",
    "Random": "flatbench.landscape.axes:Random",
    "Hessian": "flatbench.landscape.axes:Hessian",
    "Gradient": "flatbench.landscape.axes:Gradient",
    "Line": "flatbench.landscape.axes:Line",
    "Trajectory": "flatbench.landscape.axes:Trajectory",
    "plot_slice": "flatbench.landscape.figures:plot_slice",
    "plot_plane": "flatbench.landscape.figures:plot_plane",
    "plot_surface": "flatbench.landscape.figures:plot_surface",
    "plot_surface_plotly": "flatbench.landscape.figures:plot_surface_plotly",
}

__all__ = sorted(_PLACES)
__getattr__ = lazy_names(__name__, _PLACES)
