"""Save and restore the global random number streams, so that dropout continues as before."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, in a form that a training state can hold."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check(state: Mapping[str, Any]) -> None:
    """Raise ValueError if the state was taken with another number of GPUs."""
    now = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != now:
        raise ValueError(f"saved with {len(state['cuda'])} GPUs, and now there are {now}")


def restore(state: Mapping[str, Any]) -> None:
    """Put back what `state` gave."""
    check(state)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
