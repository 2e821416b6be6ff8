"""The plan of a product over batches: which pieces they are cut into, and which graphs are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from flatbench.curvature.operators import batches
from flatbench.curvature.operators.memory import TooLarge, readable
from flatbench.errors import NotFiniteError

#: time of a product, in units of one with a kept graph of the whole model: rebuilt; by blocks with their
#: graphs kept, with none kept, and with the hidden states made anew too
_REBUILT, _LINKED, _LEAN, _ANEW = 1.5, 1.1, 2.0, 2.8
#: bytes of a graph beyond which a CPU's caches make smaller pieces faster
CACHED = 64_000_000
#: tokens that are compared at a time with what they are without padding
_COMPARED_TOKENS = 2048


@dataclass(frozen=True)
class ProductPlan:
    """How products will be made, and what they need.

    Attributes:
        method: ``double backward`` or ``central differences``.
        reason: why the method is not double backward; empty if it is.
        kept: pieces whose graphs are kept across products, smallest first.
        rebuilt: pieces whose graphs are built anew for every product.
        kept_bytes: memory of the kept graphs.
        peak_bytes: of a product with a vector, and of the measurements that the plan was made of: kept
            graphs, the largest graph that is rebuilt, intermediate results, the vectors that a product makes.
        several_bytes: of a product with as many vectors as are taken at a time.
        padding: share of the batches' elements that was padding and is left out.
        way: ``whole graph``, or ``blocks``: block by block, see `flatbench.curvature.operators.blockwise`.
        way_reason: why it is the whole graph, where that was not plain.
        graphs: by kept piece, how many blocks keep their graph; empty for the whole graph.
        chain: how many blocks there are; 0 for the whole graph.
        head: how logits over a large vocabulary are computed; empty where there are none.
        together: how many vectors a product takes at a time: they share graphs that are rebuilt.
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
    together: int = 1
    several_bytes: int = 0

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
        more = f" ({readable(self.several_bytes)} with {self.together} vectors)" if self.together > 1 else ""
        return (
            f"products by {self.method}{why}, {how} over {count} "
            f"piece{'s' * (count != 1)}{saved}; peak memory about {readable(self.peak_bytes)}{more}"
        )


@dataclass(frozen=True)
class Bytes:
    """Memory as a linear function of a piece's number of elements."""

    fixed: float
    per_element: float

    def of(self, elements: float) -> float:
        """Bytes for so many elements."""
        return self.fixed + self.per_element * elements

    def __call__(self, piece: Any) -> float:
        """Bytes for a piece."""
        return self.of(batches.size_of([piece]))

    def __add__(self, other: Bytes) -> Bytes:
        """Both together."""
        return Bytes(self.fixed + other.fixed, self.per_element + other.per_element)


def measured(pieces: Sequence[Any], bytes_of: Callable[[Any], Sequence[float]]) -> list[Bytes]:
    """From what one and two rows of a piece take, of that whose rows are largest, number by number.

    Two rows for which there is no room (TooLarge) are left out: then all grows with the elements. Rows whose
    loss has no terms, or is no number, such as those without a label, are passed over while others have some.
    """
    first: Sequence[float] = ()
    refused: NotFiniteError | None = None
    wide = sorted(pieces, key=lambda piece: -batches.size_of([piece]) / batches.rows(piece))
    for widest, row in ((piece, row) for piece in wide for row in range(batches.rows(piece))):
        one = batches.chosen(widest, slice(row, row + 1))
        size = batches.size_of([one])
        try:
            first = bytes_of(one)
        except NotFiniteError as error:
            refused = error
            continue
        if any(first):  # the row has terms
            break
    else:
        if refused is not None:
            raise refused
    proportional = [Bytes(0.0, found / size) for found in first]
    if batches.rows(widest) == 1 or not first:
        return proportional
    start = min(row, batches.rows(widest) - 2)
    two = batches.chosen(widest, slice(start, start + 2))
    more = max(batches.size_of([two]) - size, 1)
    try:
        slopes = [max(b - a, 0) / more for a, b in zip(first, bytes_of(two), strict=True)]
    except TooLarge:
        return proportional
    return [Bytes(max(a - slope * size, 0.0), slope) for a, slope in zip(first, slopes, strict=True)]


def without_padding(batch: Any) -> list[Any]:
    """The batch cut into pieces of similar length, each without the columns that none of its rows needs."""
    needed = batches.lengths(batch)
    if needed is None:
        return [batch]
    groups = batches.groups_by_length(needed)
    if len(groups) == 1 and groups[0][1] == batch["attention_mask"].shape[1]:
        return [batch]
    return [batches.chosen(batch, index.sort().values, length) for index, length in groups]


def cut_and_padded(batch: Any, count: int = 8) -> Iterator[tuple[Any, Any]]:
    """Rows of what `without_padding` makes of a batch, as they are there and as they are in the batch.

    One of every piece, of at most ``count`` pieces: the shortest, which has most padding in both. All rows, a
    few at a time, where the padding of some holds what that of others does not.
    """
    needed = batches.lengths(batch)
    assert needed is not None
    groups = batches.groups_by_length(needed)
    if not batches.is_plain_beyond(batch, needed):
        few = max(_COMPARED_TOKENS // batch["attention_mask"].shape[1], 1)
        for index, length in groups:
            for part in index.split(few):
                yield batches.chosen(batch, part, length), batches.chosen(batch, part)
        return
    ends = torch.linspace(0, len(groups) - 1, min(count, len(groups))).round().long().unique()
    for i in ends.tolist():
        index, length = groups[i]
        row = index[needed[index].argmin()][None]
        yield batches.chosen(batch, row, length), batches.chosen(batch, row)


def sample_of(batch: Any, count: int = 8) -> Any:
    """A few rows of a batch, its shortest and its longest, to compare ways of cutting on."""
    needed = batches.lengths(batch)
    total = batches.rows(batch)
    order = torch.arange(total) if needed is None else torch.argsort(needed, stable=True)
    ends = torch.linspace(0, total - 1, min(count, total)).round().long().unique()
    return batches.chosen(batch, order[ends])


def across(several: Sequence[Any], count: int = 4) -> Iterator[Any]:
    """The first rows of each batch together with those of the next, where they are of one shape."""
    for one, other in itertools.pairwise(several):
        joined = batches.joined(*(batches.chosen(batch, slice(0, count)) for batch in (one, other)))
        if joined is not None:
            yield joined


def split(piece: Any, parts: int) -> list[Any]:
    """A piece cut into about equal parts by rows; itself, not a copy, if it is one part."""
    if parts == 1:
        return [piece]
    index = torch.arange(batches.rows(piece))
    return [batches.chosen(piece, part) for part in index.chunk(parts)]


def fitting(pieces: Sequence[Any], size: Bytes, budget: float) -> list[Any] | None:
    """The pieces cut so that what each takes fits the budget; None if a single row's does not."""
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


def arrange(
    pieces: Sequence[Any], size: Bytes, transient: Bytes, budget: float, padding: float
) -> ProductPlan:
    """Double backward: keep the graphs of as many pieces as the budget holds, smallest first.

    Args:
        size: of a graph.
        transient: what a product takes beside it.
    """
    pieces = sorted(pieces, key=lambda piece: batches.size_of([piece]))
    sizes = [size(piece) for piece in pieces]
    moving = max(map(transient, pieces))

    def peak(kept: int) -> float:
        return sum(sizes[:kept]) + moving + (sizes[-1] if kept < len(sizes) else 0.0)

    kept = len(pieces)
    while kept and peak(kept) > budget:
        kept -= 1
    total = sum(sizes[:kept])
    return ProductPlan(
        "double backward", "", pieces[:kept], pieces[kept:], int(total), int(peak(kept)), padding
    )


class PieceSizes(Protocol):
    """Bytes of pieces that are gone through block by block."""

    @property
    def blocks(self) -> int:
        """How many blocks there are."""

    def of(self, elements: int, kept: int) -> float:
        """What a piece holds between products, with so many blocks' graphs kept."""

    def transient(self, elements: int, kept: int, vectors: int = 1) -> float:
        """What a product with so many vectors takes beside."""


def arrange_blocks(
    pieces: Sequence[Any],
    size: PieceSizes,
    budget: float,
    padding: float,
    together: int = 1,
    vectors: Callable[[int, bool], float] = lambda count, rebuilt: 0.0,
) -> ProductPlan:
    """Block by block: keep the hidden states of as many pieces as the budget holds, and then blocks' graphs.

    Args:
        pieces: each of which fits.
        together: the most vectors that a product may take at a time.
        vectors: bytes of the vectors that a product with so many makes, where pieces are rebuilt or not.
    """
    pieces = sorted(pieces, key=lambda piece: batches.size_of([piece]))
    counts = [batches.size_of([piece]) for piece in pieces]
    moving = max(size.transient(count, 0) for count in counts)
    anew = size.of(counts[-1], 0)
    kept, held = 0, 0.0
    for place, count in enumerate(counts):
        left = anew if place + 1 < len(counts) else 0.0
        if held + size.of(count, 0) + left + moving > budget:
            break
        kept, held = kept + 1, held + size.of(count, 0)
    rebuilt = pieces[kept:]
    anew = anew if rebuilt else 0.0
    graphs: list[int] = []
    for count in counts[:kept]:
        number = 0
        for more in range(1, size.blocks + 1):
            full = more == size.blocks and not rebuilt and all(k == size.blocks for k in graphs)
            last = full and len(graphs) == kept - 1
            # where every graph is kept, none is made in a product
            passing = max(size.transient(c, size.blocks) for c in counts) if last else moving
            if held + size.of(count, more) - size.of(count, 0) + passing + anew <= budget:
                number = more
        graphs.append(number)
        held += size.of(count, number) - size.of(count, 0)
    every = size.blocks if not rebuilt and all(k == size.blocks for k in graphs) else 0

    def peak(count: int) -> float:
        return held + anew + max(size.transient(each, every, count) for each in counts)

    while together > 1 and (every or peak(together) > budget):
        together -= 1
    one, several = (int(peak(count) + vectors(count, bool(rebuilt))) for count in (1, together))
    return ProductPlan(
        "double backward", "", pieces[:kept], rebuilt, int(held), one, padding,
        "blocks", "", tuple(graphs), size.blocks, together=together, several_bytes=several,
    )  # fmt: skip


def differences(
    pieces: Sequence[Any], gradient: Bytes, weights: int, padding: float, reason: str
) -> ProductPlan:
    """Central differences: one gradient at a time, with a copy of the weights beside.

    Args:
        gradient: what a gradient takes.
        weights: bytes of the copy.
    """
    peak = max(map(gradient, pieces)) + weights
    return ProductPlan("central differences", reason, [], pieces, 0, int(peak), padding)
