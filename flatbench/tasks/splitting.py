"""Dividing examples into parts of given sizes, stratified and always in the same way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from flatbench.errors import InputError

Indices = NDArray[np.int64]


def stratified(
    pool: Indices, size: int | None, strata: Sequence[int], seed: int, option: str
) -> tuple[Indices, Indices]:
    """``size`` members of ``pool`` with each stratum's share kept, and the rest; both in ascending order.

    Args:
        pool: indices into ``strata``.
        size: how many are taken; all if None.
        strata: class of every example.
        option: name of the option that asks for ``size``, for messages.

    Raises:
        InputError: more are asked for than there are, fewer than there are strata, or a stratum has one
            member only and cannot be divided.
    """
    if size is None or size == len(pool):
        return np.sort(pool), pool[:0]
    if size > len(pool):
        raise InputError(f"{option}: {size} asked for, but only {len(pool)} examples are there")
    labels = np.asarray(strata)[pool]
    counts = np.unique(labels, return_counts=True)[1]
    if counts.min() < 2 or min(size, len(pool) - size) < len(counts):
        # sklearn cannot stratify what has fewer members than parts or fewer places than classes
        raise InputError(
            f"{option}: {size} of {len(pool)} examples cannot be divided by class ({len(counts)} classes, "
            f"the smallest with {counts.min()}); choose another size"
        )
    taken, rest = train_test_split(pool, train_size=size, stratify=labels, random_state=seed)
    return np.sort(taken), np.sort(rest)
