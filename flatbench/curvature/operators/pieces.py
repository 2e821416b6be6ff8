"""The plan of a product over batches: which pieces they are cut into, and which graphs are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flatbench.curvature.operators import batches
from flatbench.curvature.operators.memory import TooLarge, readable

#: what a product needs beside its graph, relative to it: the backward pass's own intermediate results
TRANSIENT = 1.3
#: time of a product, in units of one with a kept graph of the whole model: rebuilt; by blocks with their
#: graphs kept, with none kept, and with the hidden states made anew too
_REBUILT, _LINKED, _LEAN, _ANEW = 1.5, 1.1, 2.0, 2.8
#: bytes of a graph beyond which a CPU's caches make smaller pieces faster
CACHED = 64_000_000


@dataclass(frozen=True)
class Plan:
    """How products will be made, and what they need.

    Attributes:
        method: ``double backward`` or ``central differences``.
        reason: why the method is not double backward; empty if it is.
        kept: pieces whose graphs are kept across products, smallest first.
        rebuilt: pieces whose graphs are built anew for every product.
        kept_bytes: memory of the kept graphs.
        peak_bytes: of a product: kept graphs, the largest graph that is rebuilt, intermediate results.
        padding: share of the batches' elements that was padding and is left out.
        way: ``whole graph``, or ``blocks``: block by block, see `flatbench.curvature.operators.blockwise`.
        way_reason: why it is the whole graph, where that was not plain.
        graphs: by kept piece, how many blocks keep their graph; empty for the whole graph.
        chain: how many blocks there are; 0 for the whole graph.
        head: how logits over a large vocabulary are computed; empty where there are none.
    """

    method: str
    reason: str
    kept: Sequence[Any]
    rebuilt: Sequence[Any]
    kept_bytes: int
    peak_bytes: int
    padding: float
    way: str = "whole graph"
    way_reason: str = ""
    graphs: tuple[int, ...] = ()
    chain: int = 0
    head: str = ""

    @property
    def graph(self) -> str:
        """``kept``, ``partly kept`` or ``rebuilt``."""
        if not self.kept or (self.chain and not any(self.graphs)):
            return "rebuilt"
        return "partly kept" if self.rebuilt or any(k < self.chain for k in self.graphs) else "kept"

    @property
    def cost(self) -> float:
        """Estimated time of a product, in units of one with all graphs kept."""
        kept, rebuilt = batches.size_of(self.kept), batches.size_of(self.rebuilt)
        if self.way == "blocks":
            sizes = [batches.size_of([piece]) for piece in self.kept]
            walked = sum(
                size * (_LEAN + (_LINKED - _LEAN) * k / self.chain)
                for size, k in zip(sizes, self.graphs, strict=True)
            )
            return (walked + _ANEW * rebuilt) / (kept + rebuilt)
        return (kept + _REBUILT * rebuilt) / (kept + rebuilt)

    def describe(self) -> str:
        """One sentence, for people, before a long computation."""
        count = len(self.kept) + len(self.rebuilt)
        why = f" ({self.reason})" if self.reason else ""
        saved = f", {self.padding:.0%} padding left out" if self.padding > 0.005 else ""
        how = f"graph {self.graph}"
        if self.way == "blocks":
            total = self.chain * count
            how = f"block by block, {sum(self.graphs)} of {total} blocks' graphs kept,"
        return (
            f"products by {self.method}{why}, {how} over {count} "
            f"piece{'s' * (count != 1)}{saved}; peak memory about {readable(self.peak_bytes)}"
        )


@dataclass(frozen=True)
class GraphSize:
    """Bytes of a piece's graph as a linear function of its number of elements."""

    fixed: float
    per_element: float

    def __call__(self, piece: Any) -> float:
        """Bytes of a piece's graph."""
        return self.fixed + self.per_element * batches.size_of([piece])

    @classmethod
    def measured(cls, pieces: Sequence[Any], bytes_of: Callable[[Any], int]) -> GraphSize:
        """From graphs of one and of two rows of the piece whose rows are largest."""
        widest = max(pieces, key=lambda piece: batches.size_of([piece]) / batches.rows(piece))
        one = batches.chosen(widest, slice(0, 1))
        size = batches.size_of([one])
        first = bytes_of(one)
        if batches.rows(widest) == 1:
            return cls(0.0, first / size)
        two = batches.chosen(widest, slice(0, 2))
        try:
            slope = max(bytes_of(two) - first, 0) / max(batches.size_of([two]) - size, 1)
        except TooLarge:
            return cls(0.0, first / size)
        return cls(max(first - slope * size, 0.0), slope)


def without_padding(batch: Any) -> list[Any]:
    """The batch cut into pieces of similar length, each without the columns that none of its rows needs."""
    needed = batches.lengths(batch)
    if needed is None:
        return [batch]
    groups = batches.groups_by_length(needed)
    if len(groups) == 1 and groups[0][1] == batch["attention_mask"].shape[1]:
        return [batch]
    return [batches.chosen(batch, index.sort().values, length) for index, length in groups]


def sample_of(batch: Any, count: int = 8) -> Any:
    """A few rows of a batch, its shortest and its longest, to compare ways of cutting on."""
    needed = batches.lengths(batch)
    total = batches.rows(batch)
    order = torch.arange(total) if needed is None else torch.argsort(needed, stable=True)
    ends = torch.linspace(0, total - 1, min(count, total)).round().long().unique()
    return batches.chosen(batch, order[ends])


def split(piece: Any, parts: int) -> list[Any]:
    """A piece cut into about equal parts by rows."""
    index = torch.arange(batches.rows(piece))
    return [batches.chosen(piece, part) for part in index.chunk(parts)]


def fitting(pieces: Sequence[Any], size: GraphSize, budget: float) -> list[Any] | None:
    """The pieces cut so that each graph fits the budget; None if a single row's does not."""
    found: list[Any] = []
    for piece in pieces:
        row = batches.chosen(piece, slice(0, 1))
        if size(piece) <= budget:
            found.append(piece)
            continue
        if size(row) > budget:
            return None
        room = max(int((budget - size.fixed) // max(size(row) - size.fixed, 1e-9)), 1)
        found += split(piece, math.ceil(batches.rows(piece) / room))
    return found


def arrange(pieces: Sequence[Any], size: GraphSize, budget: float, padding: float) -> Plan:
    """Double backward: keep the graphs of as many pieces as the budget holds, smallest first."""
    pieces = sorted(pieces, key=lambda piece: batches.size_of([piece]))
    sizes = [size(piece) for piece in pieces]
    largest = max(sizes)
    kept = len(pieces)
    while kept and sum(sizes[:kept]) + _transient_bytes(sizes, kept, largest) > budget:
        kept -= 1
    total = sum(sizes[:kept])
    peak = total + _transient_bytes(sizes, kept, largest)
    return Plan("double backward", "", pieces[:kept], pieces[kept:], int(total), int(peak), padding)


class PieceSizes(Protocol):
    """Bytes of pieces that are gone through block by block."""

    @property
    def blocks(self) -> int:
        """How many blocks there are."""

    def of(self, elements: int, kept: int) -> float:
        """What a piece holds between products, with so many blocks' graphs kept."""

    def transient(self, elements: int) -> float:
        """What a product takes beside."""


def arrange_blocks(
    pieces: Sequence[Any], size: PieceSizes, budget: float, beside: float, padding: float
) -> Plan:
    """Block by block: keep the hidden states of as many pieces as the budget holds, and then blocks' graphs.

    Args:
        pieces: each of which fits.
        beside: bytes that a product takes whatever the piece.
    """
    pieces = sorted(pieces, key=lambda piece: batches.size_of([piece]))
    counts = [batches.size_of([piece]) for piece in pieces]
    moving = max(map(size.transient, counts)) + beside
    anew = size.of(counts[-1], 0)
    kept, held = 0, 0.0
    for place, count in enumerate(counts):
        left = anew if place + 1 < len(counts) else 0.0
        if held + size.of(count, 0) + left + moving > budget:
            break
        kept, held = kept + 1, held + size.of(count, 0)
    rebuilt = pieces[kept:]
    room = budget - held - moving - (anew if rebuilt else 0.0)
    graphs = []
    for count in counts[:kept]:
        one = size.of(count, 1) - size.of(count, 0)
        graphs.append(max(min(int(room // one) if one else size.blocks, size.blocks), 0))
        room -= graphs[-1] * one
        held += graphs[-1] * one
    peak = held + moving + (anew if rebuilt else 0.0)
    return Plan(
        "double backward", "", pieces[:kept], rebuilt, int(held), int(peak), padding,
        "blocks", "", tuple(graphs), size.blocks,
    )  # fmt: skip


def _transient_bytes(sizes: Sequence[float], kept: int, largest: float) -> float:
    return TRANSIENT * largest + (largest if kept < len(sizes) else 0.0)


class BudgetError(Exception):
    """A budget that holds no example's graph.

    Attributes:
        least: bytes that would.
    """

    def __init__(self, least: float) -> None:
        super().__init__(least)
        self.least = least


def differences(
    pieces: Sequence[Any], gradient: GraphSize, budget: float, weights: int, padding: float, reason: str
) -> Plan:
    """Central differences: one gradient at a time, with a copy of the weights beside.

    Args:
        gradient: the size of a gradient's graph.

    Raises `BudgetError` if the budget does not hold one example's.
    """
    cut = fitting(pieces, gradient, budget - weights)
    if cut is None:
        least = max(gradient(batches.chosen(p, slice(0, 1))) for p in pieces) + weights
        raise BudgetError(least)
    peak = max(map(gradient, cut)) + weights
    return Plan("central differences", reason, [], cut, 0, int(peak), padding)
