"""Check the splits of a task from another package: disjoint, and made by the seed alone.

The tasks of this package are held to it by their contract tests, which a plug-in may not have run.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatbench.errors import InputError
from flatbench.machine import random_streams
from flatbench.tasks.base import Splits, Task


def check_splits(task: Task, seed: int) -> None:
    """Compare the splits with each other, and with those of a second call.

    Raises InputError where an example is in the training split and in another one, or where another global
    random state gives other splits. The global random states are left as they were found.
    """
    first = _digests(task.splits(seed))
    states = random_streams.state()
    try:
        random.seed(seed + 1)
        np.random.seed((seed + 1) % 2**32)
        torch.manual_seed(seed + 1)
        second = _digests(task.splits(seed))
    finally:
        random_streams.restore(states)
    for name, examples in first.items():
        if examples != second[name]:
            raise InputError(
                f"two calls of splits({seed}) give different {name} examples: draw them from a generator of "
                "the seed (flatbench.seeding.derive_seed), not from the global random state"
            )
    train = set(first.pop("train"))
    for name, examples in first.items():
        shared = train.intersection(examples)
        if shared:
            raise InputError(
                f"{len(shared)} examples are in the splits train and {name}: what is measured on {name} "
                "would be what was learned by heart; take them out of one of the two"
            )


def _digests(splits: Splits) -> dict[str, list[str]]:
    return {name: [_digest(part[i]) for i in range(len(part))] for name, part in splits.parts().items()}


def _digest(example: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    for key in sorted(example):
        value = example[key]
        found.update(key.encode())
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()
