"""A statement as data: what is claimed, the numbers it rests on, and what is to be held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flatbench.report.analysis.statistics import LEVEL


@dataclass(frozen=True)
class Statement:
    """One statement.

    Attributes:
        kind: ``difference``, ``highest``, ``flattest``, ``relation``, ``cost`` or ``nothing``.
        subject: a method, or a flatness measure for a relation.
        condition: a condition's label, "" if there is one only, or `ALL`.
        quantity: what the statement is about, as the tables name it.
        claim: what is claimed; "" if nothing is.
        estimate, low, high: in the stored unit, as a ratio if ``scale`` is ``ratio``; None if unknown.
        n: seeds, or configurations for a relation.
        basis: how the numbers were made.
        role: ``main`` if it counts among those that the error rate is kept for, else ``further``.
        reservations: what is to be held against it.
        details: more numbers that the text uses.
    """

    kind: str
    subject: str
    condition: str
    quantity: str
    claim: str
    estimate: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = LEVEL
    scale: str = "difference"
    n: int = 0
    basis: str = ""
    role: str = "main"
    reservations: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
