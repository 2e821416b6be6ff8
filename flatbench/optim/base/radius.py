"""The radius of a perturbation and its schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

RhoSchedule = Literal["constant", "linear", "cosine", "inv_sqrt", "growing_cosine", "lr"]
Norm = Literal["global", "layer"]


class Radius:
    """The radius ``rho`` over training (arXiv 2508.00522 reduces it; its text does not say how).

    ``constant``: rho; ``linear``: rho·(1 - t/T); ``cosine``: rho·(1 + cos(π·t/T))/2; ``inv_sqrt``:
    rho/sqrt(t + 1); ``growing_cosine``: rho·(1 - cos(π·t/T))/2; ``lr``: rho times the learning rate's share
    of its largest value. t = 0 at the first step and T = ``total_steps``.

    Args:
        name: what the value is called, for messages.

    Raises:
        ValueError: rho is negative, or T is missing where the schedule needs it.
    """

    def __init__(self, rho: float, schedule: RhoSchedule, total_steps: int | None, name: str = "rho") -> None:
        if not rho >= 0:
            raise ValueError(f"{name} must not be negative, found {rho}")
        if schedule not in get_args(RhoSchedule):
            known = ", ".join(get_args(RhoSchedule))
            raise ValueError(f"unknown {name}_schedule '{schedule}'; known: {known}")
        if schedule in ("linear", "cosine", "growing_cosine") and not total_steps:
            raise ValueError(f"{name}_schedule '{schedule}' needs total_steps")
        self.rho, self.schedule, self.total_steps = rho, schedule, total_steps or 1

    def at(self, step: int, lr_share: float = 1.0) -> float:
        """The radius of step ``step``, counted from 0."""
        done = min(step / self.total_steps, 1.0)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": (1.0 + math.cos(math.pi * done)) / 2,
            "inv_sqrt": 1.0 / math.sqrt(step + 1),
            "growing_cosine": (1.0 - math.cos(math.pi * done)) / 2,
            "lr": lr_share,
        }
        return self.rho * factor[self.schedule]


def lr_share(groups: Sequence[Mapping[str, Any]]) -> float:
    """The first group's learning rate as a share of its scheduler's largest one, at most 1.

    That is the one that the scheduler started from, or what it names as its largest (OneCycleLR starts from
    a small part of that).
    """
    first = groups[0]
    largest = float(first.get("max_lr", first.get("initial_lr", first["lr"])))
    return min(float(first["lr"]) / largest, 1.0) if largest else 0.0
