"""Dividing examples into parts of given sizes, stratified and always in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def divide(
    strata: Mapping[str, Sequence[int]], sizes: Mapping[str, int | None], seed: int
) -> dict[str, tuple[str, Indices]]:
    """Which examples of which source each of ``train``, ``validation``, ``test`` is made of.

    ``test`` and ``validation`` are held out of the source "train" where there is no source of that name: a
    fifth and a tenth of it, at most 1,000, unless ``sizes`` says else. ``train`` is the rest or a part of it.

    Args:
        strata: source -> class of every example; "train" must be there. Further sources are further test
            sets, of which as many are taken as of "test".
        sizes: part -> number of examples; all of a source if None.
        seed: decides which.

    Returns:
        Part -> (source, indices into it in ascending order), parts in the order train, validation, test, ….

    Raises:
        InputError: sizes that cannot be had.
    """
    whole = len(strata["train"])
    rest = np.arange(whole)
    found: dict[str, tuple[str, Indices]] = {}
    for part, share in (("test", 5), ("validation", 10)):
        if part not in strata:
            size = sizes[part] or max(1, min(whole // share, 1000))
            taken, rest = stratified(rest, size, strata["train"], seed, f"{part}_examples")
            found[part] = ("train", taken)
    if not len(rest):
        raise InputError("train_examples: nothing is left to train on; make validation_examples smaller")
    for source, labels in strata.items():
        pool = rest if source == "train" else np.arange(len(labels))
        option = source if source in sizes else "test"
        found[source] = (source, stratified(pool, sizes[option], labels, seed, f"{option}_examples")[0])
    first = ("train", "validation", "test")
    return {part: found[part] for part in (*first, *(name for name in found if name not in first))}
