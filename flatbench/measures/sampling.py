"""Confidence interval of an eigenvalue that was computed on a sub-sample of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import stdev
from typing import Any

import torch
from torch import Tensor

from flatbench.curvature.estimates.probes import student
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.seeding import derive_seed
from flatbench.subject.objective import rows

#: groups of examples whose quotients are compared
GROUPS = 8


def groups(batches: Sequence[Mapping[str, Tensor]], seed: int) -> list[list[Mapping[str, Tensor]]]:
    """The examples dealt out at random to at most `GROUPS` groups of about equal size."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "groups") % 2**62)
    count = min(GROUPS, sum(map(rows, batches)))
    dealt: list[list[Mapping[str, Tensor]]] = [[] for _ in range(count)]
    offset = 0
    for batch in batches:
        size = rows(batch)
        place = (torch.randperm(size, generator=generator) + offset) % count
        offset += size
        for group in range(count):
            index = (place == group).nonzero().flatten()
            if len(index):
                dealt[group].append(
                    {k: v[index.to(v.device)] if v.ndim and len(v) == size else v for k, v in batch.items()}
                )
    return dealt


def half_widths(
    operator_of: Callable[[Sequence[Mapping[str, Tensor]]], SymmetricOperator],
    batches: Sequence[Mapping[str, Tensor]],
    vectors: Tensor,
    share: float,
    seed: int,
) -> tuple[list[float], int]:
    """Half the width of a 95 % interval for every eigenvalue, from the spread of ``vᵀ H_g v`` over groups g.

    For the eigenvalue of all examples along the vector that the sample gave; the choice of the vector, which
    lifts a sample's largest eigenvalue a little, is not in it.

    Args:
        operator_of: the Hessian of the loss over some batches.
        vectors: ``(n, k)``, unit eigenvectors of the sample.
        share: of all examples that are in the sample; the interval closes as it nears 1.

    Returns:
        The half-widths, and the products spent, in products over the whole sample.
    """
    quotients: list[list[float]] = []
    for group in groups(batches, seed):
        with operator_of(group) as operator:
            products = operator @ vectors
            quotients.append((vectors * products).double().sum(dim=0).tolist())
    count = len(quotients)
    if count < 2:
        return [math.inf] * vectors.shape[1], vectors.shape[1]
    left = math.sqrt(max(1 - share, 0.0))
    spread: list[float] = [stdev(column) for column in zip(*quotients, strict=True)]
    return [student(count) * s / math.sqrt(count) * left for s in spread], vectors.shape[1]


def enough(values: Sequence[float], widths: Sequence[float], wanted: float) -> bool:
    """Whether every half-width is within ``wanted``, relative to its value."""
    return all(width <= wanted * abs(value) for value, width in zip(values, widths, strict=True))


def describe(widths: Sequence[float]) -> dict[str, Any]:
    """Result entries ``sampling_error_i``; None where there are too few examples to tell."""
    return {
        f"sampling_error_{i}": width if math.isfinite(width) else None
        for i, width in enumerate(widths, start=1)
    }
