"""Recognise that memory ran out, choose a smaller micro-batch, and advise the user."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from flatbench.config.sections import TrainOptions
from flatbench.store.claims import Claim

#: how allocators that raise no error of a kind of their own say it
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")

ADVICE = (
    "lower train.micro_batch_size (gradients are accumulated, the batch stays what it is), set "
    "train.on_out_of_memory to halve_micro_batch, or model.gradient_checkpointing to true"
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _MESSAGES)


def killed_for_memory(claim: Claim) -> bool:
    """Whether the process that had held the run before was, it seems, killed for want of memory.

    It left its claim behind on this machine, whose count of such kills has grown since.
    """
    before, now = claim.after, claim.holder
    if before is None or before.place != now.place:
        return False
    if before.killed_for_memory is None or now.killed_for_memory is None:
        return False
    return now.killed_for_memory > before.killed_for_memory


def smaller(train: TrainOptions, environment: Mapping[str, Any]) -> int | None:
    """Half the examples in a forward pass, if the study allows it and it was not done before; else None."""
    if train.on_out_of_memory != "halve_micro_batch" or "micro_batch_size" in environment:
        return None
    size = min(train.micro_batch_size or train.batch_size, train.batch_size)
    return math.ceil(size / 2) if size > 1 else None
