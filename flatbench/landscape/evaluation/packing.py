"""Batches without padding and of a good size, from whatever batches a data loader gave."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatbench.curvature.operators.batches import is_plain_beyond
from flatbench.labels import IGNORED
from flatbench.subject.objective import rows

Batch = Mapping[str, Tensor]

#: what padded places hold where a batch must be made longer: labels that count for nothing, else zeros
PADDING = {"labels": IGNORED}
#: inputs that the attention mask hides from the model
_HIDDEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")


@dataclass(frozen=True)
class Packing:
    """How large batches shall be.

    Attributes:
        tokens: at most so many tokens in a batch, padding included (examples, where there is no attention
            mask); an example that is longer is a batch by itself.
        overhead: tokens that cost as much time as beginning a batch does.
    """

    tokens: int
    overhead: float


def packed(batches: Sequence[Batch], packing: Packing) -> list[Batch]:
    """The same examples in batches of the wanted size, examples of like length together.

    Padding on the right, known by an ``attention_mask`` ``(n, length)``, is cut off; the partition of the
    examples, sorted by length, is the one with the fewest tokens, padding and overhead included. Batches that
    cannot be taken apart into examples are given back as they are.
    """
    if not batches or not all(_is_rowwise(batch, batches[0]) for batch in batches):
        return list(batches)
    lengths = [_lengths(batch) for batch in batches]
    pairs = zip(batches, lengths, strict=True)
    if not all(is_plain_beyond(_not_hidden(batch), torch.tensor(found)) for batch, found in pairs):
        return list(batches)  # labels in the padding of some, which would be cut off
    places = [(length, b, r) for b, found in enumerate(lengths) for r, length in enumerate(found)]
    places.sort(key=lambda place: place[0])  # stable: examples of one length stay in their order
    groups = partition_lengths([place[0] for place in places], packing)
    return [_collect_batch([places[i] for i in range(*group)], batches) for group in groups]


def _not_hidden(batch: Batch) -> dict[str, Tensor]:
    """What of a batch a model sees whatever its attention mask says."""
    return {key: value for key, value in batch.items() if key not in _HIDDEN}


def _is_rowwise(batch: Batch, first: Batch) -> bool:
    count = rows(batch)
    return (
        batch.keys() == first.keys()
        and all(value.ndim and len(value) == count for value in batch.values())
        and all(value.shape[2:] == first[key].shape[2:] for key, value in batch.items())
        and ("attention_mask" in batch or all(v.shape[1:] == first[k].shape[1:] for k, v in batch.items()))
    )


def _lengths(batch: Batch) -> list[int]:
    """Tokens of each example, where padding is on the right; 1 without a mask."""
    mask = batch.get("attention_mask")
    if mask is None:
        return [1] * rows(batch)
    if mask.ndim != 2 or bool((mask[:, 1:] > mask[:, :-1]).any()) or bool((mask > 1).any()):
        return [mask.shape[1] if mask.ndim > 1 else 1] * len(mask)
    return [max(int(length), 1) for length in mask.sum(1).tolist()]


def partition_lengths(lengths: Sequence[int], packing: Packing) -> list[tuple[int, int]]:
    """Ranges of the sorted lengths with the least total of ``count · longest + overhead``."""
    if lengths[0] == lengths[-1]:
        return _equal_parts(len(lengths), max(1, packing.tokens // lengths[0]))
    best, cut = [0.0], [0]
    for end in range(1, len(lengths) + 1):
        longest, least, where = lengths[end - 1], math.inf, end - 1
        for start in range(end - 1, -1, -1):
            if (end - start) * longest > packing.tokens and start < end - 1:
                break
            cost = best[start] + (end - start) * longest + packing.overhead
            if cost < least:
                least, where = cost, start
        best.append(least)
        cut.append(where)
    ranges, end = [], len(lengths)
    while end:
        ranges.append((cut[end], end))
        end = cut[end]
    return ranges[::-1]


def _equal_parts(count: int, limit: int) -> list[tuple[int, int]]:
    parts = math.ceil(count / limit)
    edges = [count * i // parts for i in range(parts + 1)]
    return list(itertools.pairwise(edges))


def _collect_batch(places: Sequence[tuple[int, int, int]], batches: Sequence[Batch]) -> Batch:
    """One batch of the examples at ``(length, batch, row)``."""
    longest = max(length for length, _, _ in places)
    by_batch: dict[int, list[int]] = {}
    for _, b, r in places:
        by_batch.setdefault(b, []).append(r)
    if len(by_batch) == 1:
        ((b, chosen),) = by_batch.items()
        if chosen == list(range(rows(batches[b]))) and _width(batches[b]) in (longest, None):
            return batches[b]
    parts = [_take_rows(batches[b], chosen, longest) for b, chosen in by_batch.items()]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _width(batch: Batch) -> int | None:
    mask = batch.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.shape[1]


def _take_rows(batch: Batch, chosen: Sequence[int], longest: int) -> dict[str, Tensor]:
    width, found = _width(batch), {}
    for key, value in batch.items():
        part = value[chosen[0] : chosen[-1] + 1] if _consecutive(chosen) else value[list(chosen)]
        if width is not None and part.ndim >= 2 and part.shape[1] == width:
            part = part[:, :longest]
            if part.shape[1] < longest:
                missing = (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])
                part = torch.nn.functional.pad(part, missing, value=PADDING.get(key, 0))
        found[key] = part
    return found


def _consecutive(chosen: Sequence[int]) -> bool:
    return list(chosen) == list(range(chosen[0], chosen[0] + len(chosen)))
