"""Digests of what decides a landscape's numbers, so that the same request is known again."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from flatbench.landscape.evaluation.collect import name_of
from flatbench.landscape.evaluation.packing import Batch
from flatbench.store import digest


def data_digest(batches: Sequence[Batch]) -> str:
    """Hex SHA-256 of batches: names, shapes and contents."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].detach().cpu().contiguous()
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return found.hexdigest()


def function_digest(function: Any) -> str:
    """Name, source and closed-over values of a function.

    Where the source is not to be had, or a value shows its address, another process will not know it again.
    """
    try:
        source = inspect.getsource(getattr(function, "__func__", function))
    except (OSError, TypeError):
        source = repr(function)
    closure = [repr(cell.cell_contents) for cell in getattr(function, "__closure__", None) or ()]
    return digest([name_of(function), source, closure, repr(getattr(function, "__defaults__", None))])
