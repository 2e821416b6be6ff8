"""Few examples of each class for train, and as many others for validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flatbench.errors import InputError
from flatbench.seeding import derive_seed


def draw(labels: Sequence[float], classes: Sequence[str], shots: int, seed: int) -> dict[str, list[int]]:
    """Which examples are ``train`` and which ``validation``, as MeZO's generator draws them.

    All examples are shuffled once. Class by class the first ``shots`` are train and the next ``shots``
    validation, as far as there are any: a class with fewer gives what it has, to train first.

    Args:
        labels: class number of every example.
        classes: names of the classes, for messages.
        seed: decides the order; the same seed, the same draw.

    Returns:
        Part -> indices into ``labels`` in ascending order.

    Raises:
        InputError: a class without an example, or no class has one left for validation.
    """
    members: list[list[int]] = [[] for _ in classes]
    for i in np.random.default_rng(derive_seed(seed, "shots")).permutation(len(labels)):
        members[int(labels[i])].append(int(i))
    for name, own in zip(classes, members, strict=True):
        if not own:
            raise InputError(f"data: class '{name}' has no example to train on")
    parts = {"train": [own[:shots] for own in members], "validation": [m[shots : 2 * shots] for m in members]}
    if not any(parts["validation"]):
        most = max(map(len, members))
        raise InputError(
            f"shots: {shots} examples of each class leave none for validation (the largest class has "
            f"{most}); take fewer"
        )
    return {part: sorted(i for own in chosen for i in own) for part, chosen in parts.items()}


def short(
    parts: Mapping[str, Sequence[float]], classes: Sequence[str], wanted: Mapping[str, int]
) -> dict[str, dict[str, int]]:
    """Part -> class -> examples that it has, where these are fewer than wanted.

    Args:
        parts: part -> class number of each of its examples.
        wanted: part -> examples of each class that were asked for.
    """
    found = {}
    for part, labels in parts.items():
        counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=len(classes)).tolist()
        pairs = zip(classes, counts, strict=True)
        found[part] = {name: count for name, count in pairs if count < wanted[part]}
    return found
