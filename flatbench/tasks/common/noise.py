"""Wrong training labels, drawn from the run's own stream."""

from __future__ import annotations

import torch
from torch import Tensor

from flatbench.seeding import derive_seed


def noisy_labels(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """A copy of ``labels`` ``(N,)`` in which ``round(share * N)`` are another class, drawn uniformly.

    Both the order and the wrong classes are drawn whole whatever the share is, so that more noise only adds
    wrong labels.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "label_noise"))
    order = torch.randperm(len(labels), generator=generator)
    shift = torch.randint(1, classes, (len(labels),), generator=generator)
    replaced = order[: round(share * len(labels))]
    noisy = labels.clone()
    noisy[replaced] = (labels[replaced] + shift[replaced]) % classes
    return noisy
