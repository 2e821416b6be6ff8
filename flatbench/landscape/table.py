"""The table of a landscape from the points that were kept: what was computed, the rest interpolated."""

from __future__ import annotations

import itertools

import numpy as np

from flatbench.landscape import adaptive as adaptive_mode
from flatbench.landscape.evaluation.collect import Values
from flatbench.landscape.result import Landscape
from flatbench.landscape.stream import Stream


def quantities(values: Values) -> list[tuple[str, str]]:
    """(split, quantity) in the order of `flat`."""
    return [(split, name) for split, found in values.items() for name in found]


def flat(values: Values) -> list[float]:
    """All numbers of a point in one list."""
    return [value for found in values.values() for value in found.values()]


def build(draws: int, kept: Stream) -> Landscape:
    """The table: what was computed as it was computed, the rest interpolated from it."""
    import pandas as pd

    assert kept.summary is not None
    summary = kept.summary
    grid = summary["grid"]
    shape = tuple(len(axis) for axis in grid)
    names = quantities(summary["origin"])
    frames, estimate = [], 0.0
    for j in range(draws):
        places = [p for p in np.ndindex(shape) if (j, *p) in kept.known]
        found = np.array([flat(kept.known[(j, *p)]) for p in places])
        if len(places) == int(np.prod(shape)):
            values, errors = found.reshape(*shape, -1), np.zeros((*shape, len(names)))
        else:
            values, errors = adaptive_mode.interpolate(shape, places, found)
            span = np.ptp(found, axis=0)
            share = (errors / np.where(span > 0, span, 1.0)).reshape(-1, len(names)).max(axis=0)
            estimate = max([estimate, *(s for s, (_, n) in zip(share, names, strict=True) if n == "loss")])
        computed = np.zeros(shape, bool)
        computed[tuple(np.transpose(places))] = True
        points = np.array(list(itertools.product(*grid)))
        for k, (split, name) in enumerate(names):
            frame = pd.DataFrame({"draw": j, **dict(zip("xy", points.T, strict=False))})
            frame["split"], frame["quantity"] = split, name
            frame["value"], frame["computed"] = values[..., k].ravel(), computed.ravel()
            frame["error"] = errors[..., k].ravel()
            frames.append(frame)
    meta = {
        **summary,
        "request": kept.request,
        "key": kept.key,
        "points": draws * int(np.prod(shape)),
        "computed": len(kept.known),
        "error_estimate": float(estimate),
    }
    return Landscape(pd.concat(frames, ignore_index=True), meta)
