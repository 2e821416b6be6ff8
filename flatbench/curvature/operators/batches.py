"""Batches of any shape: moved to a device, cut into pieces by rows, and freed of padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatbench.curvature.operators.fingerprint import checksum
from flatbench.errors import InputError

#: what another piece costs beside its tokens, in tokens: below it, cutting padding does not pay
PIECE_TOKENS = 192
#: names of tensors that have a row an example, in a batch that has them
_BY_ROW = ("attention_mask", "input_ids", "inputs_embeds", "pixel_values", "labels")


def read(batches: Iterable[Any]) -> list[Any]:
    """The batches that have rows, of an iterable that is read once.

    Raises InputError where a batch has changed when the last one was read: one buffer that is filled anew.
    """
    if isinstance(batches, list | tuple):
        return [batch for batch in batches if rows(batch)]
    found, seen = [], []
    for batch in batches:
        if rows(batch):
            found.append(batch)
            seen.append(_checksums(batch))
    if any(_checksums(batch) != before for batch, before in zip(found, seen, strict=True)):
        raise InputError(
            "the batches are one buffer that is filled anew for each: all would be the last one; give copies "
            "(tensor.clone())"
        )
    return found


def _checksums(batch: Any) -> list[int]:
    return [int(checksum(tensor)) for tensor in tensors(batch)]


def versions(batches: Sequence[Any]) -> list[int]:
    """How often each tensor was written to."""
    found = [tensor for batch in batches for tensor in tensors(batch) if not tensor.is_inference()]
    return [tensor._version for tensor in found]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on ``device``: a tensor, mapping, tuple or list, nested as it may be."""
    return transformed(batch, lambda tensor: tensor.to(device, non_blocking=True))


def transformed(batch: Any, change: Any) -> Any:
    """The batch with ``change`` applied to its tensors; its type is kept where that can be done."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return _as_batch_type(batch, {key: transformed(value, change) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(transformed(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(transformed(value, change) for value in batch)
    return batch


def _as_batch_type(batch: Mapping[str, Any], content: dict[str, Any]) -> Any:
    try:
        made: Any = type(batch)
        return made(content)
    except TypeError:
        return content


def tensors(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    transformed(batch, note)
    return found


def rows(batch: Any) -> int:
    """Number of examples: the length of a tensor that is known by its name, or else of the first one.

    1 where no tensor has a length.
    """
    known = [batch.get(name) for name in _BY_ROW] if isinstance(batch, Mapping) else []
    found = [value for value in known if isinstance(value, Tensor)] or tensors(batch)
    return next((len(tensor) for tensor in found if tensor.ndim), 1)


def chosen(batch: Any, index: Tensor | slice, length: int | None = None) -> Any:
    """Some rows of a batch; where ``length`` is given, only that many columns of what is padded.

    A tensor that does not have a row an example is kept whole. The padded tensors are those of the shape of
    ``attention_mask``, and those with one row of its width for all.
    """
    count = rows(batch)
    mask = _mask(batch)

    def change(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or len(tensor) != count:
            wide = mask is not None and tensor.shape == (1, mask.shape[1])
            return tensor[:, :length].contiguous() if wide and length is not None else tensor
        part = tensor[index.to(tensor.device) if isinstance(index, Tensor) else index]
        if length is not None and mask is not None and tensor.shape == mask.shape:
            part = part[:, :length].contiguous()  # models and losses take views of labels
        return part

    return transformed(batch, change)


def joined(one: Any, other: Any) -> Any | None:
    """The rows of two batches in one; None where their tensors do not fit together."""
    first, second = tensors(one), tensors(other)
    counts = rows(one), rows(other)
    fit = len(first) == len(second) and all(
        a.shape[1:] == b.shape[1:] and a.dtype == b.dtype and a.ndim and (len(a), len(b)) == counts
        for a, b in zip(first, second, strict=True)
    )
    if not fit:
        return None
    rest = iter(second)
    return transformed(one, lambda tensor: torch.cat([tensor, next(rest)]))


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def lengths(batch: Any) -> Tensor | None:
    """``(rows,)`` columns that each example needs, by the last 1 of its ``attention_mask``; None without."""
    mask = _mask(batch)
    if mask is None or mask.numel() == 0:
        return None
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.ne(0) * columns).amax(dim=1).clamp_min(1).cpu()


def is_plain_beyond(batch: Any, needed: Tensor) -> bool:
    """Whether padding holds one value a tensor, beyond the columns that each row needs.

    If not, some rows have content there that others do not show: labels beyond the mask, weights, positions.
    """
    mask = _mask(batch)
    if mask is None:
        return True
    beyond = torch.arange(mask.shape[1], device=mask.device) >= needed.to(mask.device)[:, None]
    padded = [tensor[beyond] for tensor in tensors(batch) if tensor.shape == mask.shape]
    return all(not len(cells) or bool((cells == cells[0]).all()) for cells in padded)


def groups_by_length(needed: Tensor) -> list[tuple[Tensor, int]]:
    """Rows sorted by length and cut into groups so that padding is small: (rows of the group, its length).

    Minimises ``Σ_groups (rows · length + PIECE_TOKENS)`` over all ways to cut the sorted rows, by dynamic
    programming over the distinct lengths.
    """
    order = torch.argsort(needed, stable=True)
    distinct, counts = torch.unique_consecutive(needed[order], return_counts=True)
    ends = torch.cumsum(counts, 0).tolist()
    sizes = distinct.tolist()
    best: list[tuple[float, int]] = [(0.0, 0)]
    for j, size in enumerate(sizes):
        before = [0, *ends]
        options = [(best[i][0] + (ends[j] - before[i]) * size + PIECE_TOKENS, i) for i in range(j + 1)]
        best.append(min(options))
    groups: list[tuple[Tensor, int]] = []
    j = len(sizes)
    while j:
        i = best[j][1]
        groups.append((order[(ends[i - 1] if i else 0) : ends[j - 1]], sizes[j - 1]))
        j = i
    return groups[::-1]


def size_of(batches: Sequence[Any]) -> int:
    """Total number of elements of the largest tensors: what a graph's memory grows with."""
    return sum(max((tensor.numel() for tensor in tensors(batch)), default=1) for batch in batches)
