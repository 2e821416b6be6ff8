"""Computed loss landscape: a tidy table, its origin and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flatbench.errors import InputError, suggest
from flatbench.report.html import html_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Landscape:
    """Quantities over a line or a plane through a checkpoint's weights.

    Attributes:
        frame: a row a draw, point, split and quantity: ``draw``, ``x`` (and ``y`` on a plane: distances
            along the axes, in the units that ``axes`` name), ``split``, ``quantity``, ``value``, ``computed``
            (False for an interpolated value) and ``error`` (its estimated absolute error, 0 where computed).
        meta: JSON-able: ``space``, ``dimension``, ``precision``, ``axes`` (per draw, per axis: label, norm
            and more), ``origin`` (split -> quantity -> value at the checkpoint), ``examples``, ``path``,
            ``how`` (how it was computed), ``points``, ``computed``, ``forwards``, ``seconds`` (of evaluating
            points, in the session that ended it), ``total_seconds`` (finding the directions included),
            ``rounding_error`` (of differences of the first split's losses, see
            `flatbench.subject.rounding`; None where it is not known), ``stored_precision`` and
            ``copy_bytes`` (of a model in half precision that was evaluated in float32),
            ``error_estimate`` (largest of the interpolated losses, as a share of their range), ``request``.
    """

    frame: pd.DataFrame
    meta: Mapping[str, Any]

    @property
    def dims(self) -> int:
        """1 for slices, 2 for a plane."""
        return 2 if "y" in self.frame.columns else 1

    @property
    def loss(self) -> float:
        """The checkpoint's own loss on the first split."""
        return float(next(iter(self.meta["origin"].values()))["loss"])

    @property
    def rounding_error(self) -> float | None:
        """How far rounding may take a difference of the first split's losses; None where it is not known."""
        found: float | None = self.meta.get("rounding_error")
        return found

    @property
    def below_resolution(self) -> bool:
        """Whether all differences of the first split's losses are within the rounding error."""
        losses = self.values()["value"]
        return self.rounding_error is not None and bool(np.ptp(losses) <= self.rounding_error)

    @property
    def axes(self) -> Sequence[str]:
        """What each axis is, with its unit, for the first draw."""
        return [axis["label"] for axis in self.meta["axes"][0]]

    def values(
        self, quantity: str = "loss", split: str | None = None, draw: int | None = None
    ) -> pd.DataFrame:
        """The rows of one quantity, of the first split unless another is named.

        Raises InputError for a quantity, split or draw that is not there.
        """
        split = split or str(self.frame["split"].iloc[0])
        for column, wanted in (("quantity", quantity), ("split", split)):
            if wanted not in set(self.frame[column]):
                raise InputError(f"no {column} '{wanted}' here; {suggest(wanted, set(self.frame[column]))}")
        chosen = self.frame[(self.frame["quantity"] == quantity) & (self.frame["split"] == split)]
        if draw is not None:
            chosen = chosen[chosen["draw"] == draw]
            if chosen.empty:
                raise InputError(f"no draw {draw} here; there are {self.frame['draw'].nunique()}")
        return chosen.reset_index(drop=True)

    def spread(self, quantity: str = "loss", split: str | None = None) -> pd.DataFrame:
        """Over the draws, at each position: ``mean``, ``std`` (n - 1), ``min``, ``max``, ``draws``."""
        keys = ["x", "y"][: self.dims]
        over_draws = self.values(quantity, split).groupby(keys)["value"]
        found = over_draws.agg(["mean", "std", "min", "max", "count"])
        return found.rename(columns={"count": "draws"}).reset_index()

    def path(self) -> pd.DataFrame | None:
        """The training trajectory in the plane, oldest first: ``x``, ``y``; None if there is none."""
        import pandas as pd

        if not self.meta.get("path"):
            return None
        return pd.DataFrame(self.meta["path"], columns=["x", "y"][: self.dims])

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """The figure that fits: `figures.plot_slice` or `figures.plot_plane`, with their options."""
        from flatbench.landscape.figures import plot_plane, plot_slice

        return (plot_slice if self.dims == 1 else plot_plane)(self, ax=ax, **options)

    def __repr__(self) -> str:
        kind = "plane" if self.dims == 2 else "slices"
        return f"<Landscape: {kind} in {self.meta['space']} space, {self.meta['points']} points>"

    def _repr_html_(self) -> str:
        return html_table(self.describe())

    def _rounding(self) -> str:
        error = self.rounding_error
        if error is None:
            return "errors of differences are not known"
        told = f"differences of the loss are within ± {error:.2g}"
        return f"{told}: all of them are below resolution" if self.below_resolution else told

    def describe(self) -> dict[str, str]:
        """What a person wants to know about it, name -> text."""
        meta = self.meta
        origin = "; ".join(
            f"{split}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            for split, found in meta["origin"].items()
        )
        points = f"{meta['points']} points, {meta['computed']} computed"
        if meta["computed"] < meta["points"]:
            share = 100 * meta["error_estimate"]
            points += f", the rest interpolated (estimated error within {share:.2g} % of the range)"
        draws = len(meta["axes"])
        return {
            "Landscape": f"{'plane' if self.dims == 2 else 'slice'} in the {meta['space']} space "
            f"({meta['dimension']:,} weights, {meta['precision']})",
            "Axes": "; ".join(self.axes) + (f"; {draws} draws" if draws > 1 else ""),
            "At the checkpoint": origin,
            "Examples": ", ".join(f"{split} {count}" for split, count in meta["examples"].items()),
            "Points": points,
            "Rounding": self._rounding(),
            "How": meta["how"],
            "Cost": f"{meta['forwards']} forward passes of a batch, {meta['seconds']:.2f} s; "
            f"{meta['total_seconds']:.2f} s in all",
        }
