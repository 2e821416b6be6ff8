"""Figures of slices and planes; each takes a `Landscape` or its tidy table and an ``ax``, and gives the axes.

Colours are seaborn's colour-blind palette and ``cividis``, whose lightness rises evenly, so that figures
survive grey printing. Nothing is shown: that is the caller's.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from flatbench.errors import InputError, suggest

if TYPE_CHECKING:
    from typing import TypeAlias

    from matplotlib.axes import Axes

    Source: TypeAlias = "Drawable | pd.DataFrame"


class Drawable(Protocol):
    """What is drawn of a `Landscape`."""

    @property
    def frame(self) -> pd.DataFrame:
        """A row a point, see `Landscape`."""

    @property
    def axes(self) -> Sequence[str]:
        """What each axis is, with its unit."""

    def path(self) -> pd.DataFrame | None:
        """The training trajectory in the plane: ``x``, ``y``; None if there is none."""


COLOURS = "cividis"
#: above this ratio of the largest to the smallest value, levels are spaced by ratio
LOG_FROM = 30.0
#: width in characters at which axis labels are broken
LABEL_WIDTH = 44
STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}


def plot_slice(
    source: Source | Mapping[str, Source],
    ax: Axes | None = None,
    *,
    quantity: str = "loss",
    splits: Sequence[str] | None = None,
    log: bool = False,
    xlabel: str | None = None,
) -> Axes:
    """Values along a line: the mean over draws, with the range of the draws as a band.

    Args:
        source: a `Landscape`, its table, or several by the names that the legend gives them.
        quantity: ``loss`` or the name of a function of the logits.
        splits: drawn in different strokes; all if None.
        log: a logarithmic value axis.
        xlabel: the axis of the source if None.

    Raises:
        InputError: a plane, or a quantity or split that is not there.
    """
    named = dict(source) if isinstance(source, Mapping) else {"": source}
    frames = {name: _select_rows(one, quantity, splits) for name, one in named.items()}
    if any("y" in frame.columns for frame in frames.values()):
        raise InputError("plot_slice: this is a plane; use plot_plane")
    ax = _ax(ax, (6.0, 4.0))
    every = list(dict.fromkeys(s for frame in frames.values() for s in frame["split"]))
    palette = sns.color_palette("colorblind", max(len(frames), len(every)))
    several = len(frames) > 1
    for i, (name, frame) in enumerate(frames.items()):
        for j, (split, part) in enumerate(frame.groupby("split", sort=False)):
            colour = palette[i] if several else palette[every.index(str(split))]
            stroke = ["-", "--", ":", "-."][every.index(str(split)) % 4]
            label = " ".join(filter(None, [name, str(split) if len(every) > 1 or not several else ""]))
            _line(ax, part, colour, stroke, label, band=j == 0 or not several)
    ax.axvline(0.0, color="0.4", linewidth=0.8, zorder=0)
    if log:
        ax.set_yscale("log")
    first = next(iter(named.values()))
    ax.set_xlabel(_wrap(xlabel or _axis_labels(first)[0]))
    ax.set_ylabel(_value_label(quantity))
    if several or len(every) > 1:
        ax.legend(frameon=False)
    _note_interpolation(ax, pd.concat(frames.values()))
    return ax


def _line(ax: Axes, part: pd.DataFrame, colour: Any, stroke: str, label: str, band: bool) -> None:
    over = part.groupby("x")["value"].agg(["mean", "min", "max", "count"]).reset_index()
    ax.plot(over["x"], over["mean"], stroke, color=colour, label=label)
    if band and over["count"].max() > 1:
        ax.fill_between(over["x"], over["min"], over["max"], color=colour, alpha=0.2, linewidth=0)


def plot_plane(
    source: Source,
    ax: Axes | None = None,
    *,
    quantity: str = "loss",
    split: str | None = None,
    draw: int = 0,
    log: bool | None = None,
    levels: int = 16,
    path: pd.DataFrame | None = None,
    labels: Sequence[str] | None = None,
    colorbar: bool = True,
    vmin: float | None = None,
    vmax: float | None = None,
) -> Axes:
    """Filled contours over a plane, with the checkpoint and, if there is one, the training trajectory.

    Values that are not finite stay white. Where points were interpolated, dots mark the computed ones.

    Args:
        split: the first one if None.
        log: levels spaced by ratio; by the range of the values if None.
        path: a trajectory in the plane, columns ``x`` and ``y``, oldest first; the source's if None.
        labels: of the two axes; the source's if None.
        colorbar: draw one beside the axes.
        vmin, vmax: limits of the colours, to compare planes; the values' own if None.

    Raises:
        InputError: not a plane, a quantity, split or draw that is not there, or no finite value.
    """
    frame = _plane(source, quantity, split, draw)
    x, y, z = _surface(frame)
    low = float(np.nanmin(z)) if vmin is None else vmin
    high = float(np.nanmax(z)) if vmax is None else vmax
    logarithmic = low > 0 and high / low > LOG_FROM if log is None else log
    if logarithmic and low <= 0:
        raise InputError("plot_plane: log: values are not all positive")
    steps, norm = _levels(low, high, levels, logarithmic)
    ax = _ax(ax, (6.0, 4.8))
    ax.grid(False)
    beyond = "neither" if vmin is None and vmax is None else "both"
    filled = ax.contourf(x, y, z.T, levels=steps, norm=norm, cmap=COLOURS, extend=beyond)
    ax.contour(x, y, z.T, levels=steps, colors="white", linewidths=0.4, alpha=0.6)
    if colorbar:
        _colorbar(ax, filled, _value_label(quantity), logarithmic)
    if path is None and not isinstance(source, pd.DataFrame):
        path = source.path()
    _draw_path(ax, path)
    if not frame["computed"].all():
        exact = frame[frame["computed"]]
        dots: Any = {"markersize": 3.5, "markeredgecolor": "0.25", "markeredgewidth": 0.5}
        ax.plot(exact["x"], exact["y"], "o", color="white", label="computed", linestyle="none", **dots)
    ax.plot(0, 0, "*", color="white", markeredgecolor="black", markersize=13, label="checkpoint", zorder=4)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    ax.set_xlim(x[0], x[-1])
    ax.set_ylim(y[0], y[-1])
    names = labels or _axis_labels(source)
    ax.set_xlabel(_wrap(names[0]))
    ax.set_ylabel(_wrap(names[1], LABEL_WIDTH - 4))
    ax.set_title(str(frame["split"].iloc[0]), fontsize="medium")
    ax.legend(loc="best", fontsize="small", framealpha=0.85)
    return ax


def plot_surface(
    source: Source,
    ax: Any = None,
    *,
    quantity: str = "loss",
    split: str | None = None,
    draw: int = 0,
    labels: Sequence[str] | None = None,
) -> Any:
    """The plane as a surface in three dimensions; ``ax`` must have ``projection="3d"``.

    Raises InputError as `plot_plane` does, and for an ``ax`` without depth.
    """
    frame = _plane(source, quantity, split, draw)
    x, y, z = _surface(frame)
    if ax is None:
        with sns.axes_style("ticks"):
            ax = plt.figure(figsize=(6.4, 5.2)).add_subplot(projection="3d")
    if not hasattr(ax, "plot_surface"):
        raise InputError('plot_surface: ax is flat; make it with projection="3d"')
    grid_x, grid_y = np.meshgrid(x, y, indexing="ij")
    ax.plot_surface(grid_x, grid_y, z, cmap=COLOURS, linewidth=0.15, edgecolor="0.3", rcount=60, ccount=60)
    names = labels or _axis_labels(source)
    ax.set_xlabel(_wrap(names[0], 36), labelpad=16, fontsize="small")
    ax.set_ylabel(_wrap(names[1], 36), labelpad=16, fontsize="small")
    ax.set_zlabel(_value_label(quantity), labelpad=8)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.set_major_locator(MaxNLocator(5))
    ax.view_init(elev=28, azim=-58)
    ax.set_box_aspect(None, zoom=0.82)
    return ax


def plot_surface_plotly(
    source: Source,
    *,
    quantity: str = "loss",
    split: str | None = None,
    draw: int = 0,
    labels: Sequence[str] | None = None,
) -> Any:
    """The plane as an interactive surface, a plotly figure. Needs the extra ``notebook``.

    Raises InputError as `plot_plane` does, and where plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise InputError(
            "plot_surface_plotly needs plotly; install it with: pip install 'flatbench-lora[notebook]'"
        ) from error
    frame = _plane(source, quantity, split, draw)
    x, y, z = _surface(frame)
    names = labels or _axis_labels(source)
    surface = go.Surface(
        x=x, y=y, z=z.T, colorscale=COLOURS, colorbar={"title": {"text": _value_label(quantity)}}
    )
    figure = go.Figure(surface)
    titles = [_wrap(name, 30).replace("\n", "<br>") for name in (*names, _value_label(quantity))]
    figure.update_layout(
        scene={f"{axis}axis": {"title": {"text": text}} for axis, text in zip("xyz", titles, strict=True)},
        margin={"l": 0, "r": 0, "t": 20, "b": 0},
        width=640,
        height=520,
    )
    return figure


# -- parts ------------------------------------------------------------------------------------------------


def _ax(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    with sns.axes_style("ticks", STYLE):
        return plt.subplots(figsize=size, layout="constrained")[1]


def _frame(source: Source) -> pd.DataFrame:
    frame = source if isinstance(source, pd.DataFrame) else source.frame
    missing = {"x", "value", "split", "quantity", "draw", "computed"} - set(frame.columns)
    if missing:
        raise InputError(f"this is no landscape's table; it lacks the columns {', '.join(sorted(missing))}")
    return frame


def _select_rows(source: Source, quantity: str, splits: Sequence[str] | None) -> pd.DataFrame:
    frame = _frame(source)
    for column, wanted in [("quantity", quantity), *(("split", split) for split in splits or ())]:
        known = set(frame[column])
        if wanted not in known:
            raise InputError(f"no {column} '{wanted}' here; {suggest(wanted, known)}")
    frame = frame[frame["quantity"] == quantity]
    return frame if splits is None else frame[frame["split"].isin(list(splits))]


def _plane(source: Source, quantity: str, split: str | None, draw: int) -> pd.DataFrame:
    frame = _frame(source)
    if "y" not in frame.columns:
        raise InputError("this is no plane but a line; use plot_slice")
    frame = _select_rows(source, quantity, [split or str(frame["split"].iloc[0])])
    frame = frame[frame["draw"] == draw]
    if frame.empty:
        raise InputError(f"no draw {draw} here")
    return frame


def _surface(frame: pd.DataFrame) -> tuple[Any, Any, Any]:
    """Positions ``(n,)`` and ``(m,)``, values ``(n, m)`` with NaN where they are not finite."""
    table = frame.pivot(index="x", columns="y", values="value")
    z = table.to_numpy(dtype=float)
    z = np.where(np.isfinite(z), z, np.nan)
    if np.isnan(z).all():
        raise InputError("there is no finite value to draw")
    return table.index.to_numpy(), table.columns.to_numpy(), z


def _levels(low: float, high: float, count: int, logarithmic: bool) -> tuple[Any, Normalize]:
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    if logarithmic:
        return np.geomspace(low, high, count), LogNorm(low, high)
    steps = MaxNLocator(count, min_n_ticks=count // 2).tick_values(low, high)
    return np.unique(np.clip(steps, low, high)), Normalize(low, high)


def _colorbar(ax: Axes, filled: Any, label: str, logarithmic: bool) -> None:
    bar = ax.figure.colorbar(filled, ax=ax, label=label)
    if logarithmic:
        bar.locator = LogLocator(10, subs=(1.0, 2.0, 5.0))
        bar.formatter = ScalarFormatter()
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.set_label(f"{label} (log scale)")
    else:
        bar.locator = MaxNLocator(8)
    bar.update_ticks()


def _draw_path(ax: Axes, path: pd.DataFrame | None) -> None:
    if path is None or path.empty:
        return
    colour = sns.color_palette("colorblind")[1]
    ax.plot(path["x"], path["y"], "o-", color=colour, markersize=4, linewidth=1.5, label="training", zorder=3)
    ax.plot(path["x"].iloc[0], path["y"].iloc[0], "s", color=colour, markersize=7, label="start", zorder=3)


def _axis_labels(source: Source) -> list[str]:
    if isinstance(source, pd.DataFrame):
        return ["position along the first direction", "position along the second direction"]
    return list(source.axes)


def _value_label(quantity: str) -> str:
    return {"loss": "loss (nats)", "accuracy": "accuracy (share)"}.get(quantity, quantity)


def _wrap(text: str, width: int = LABEL_WIDTH) -> str:
    """Broken before the unit, and further where a part is still too long."""
    if len(text) <= width:
        return text
    name, bracket, unit = text.partition(" (")
    parts = [name, f"({unit}"] if bracket else [name]
    return "\n".join(line for part in parts for line in textwrap.wrap(part, width))


def _note_interpolation(ax: Axes, frame: pd.DataFrame) -> None:
    share = 1 - frame["computed"].mean()
    if share > 0 and not math.isnan(share):
        ax.set_title(f"{100 * share:.0f} % of the points interpolated", fontsize="small")
