"""Memory of products block by block, measured: the tail's product, and a block of each kind's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators.blockwise import Blockwise, Build
from flatbench.curvature.operators.entropy import CHUNK, TENSORS
from flatbench.curvature.operators.graphs import Before, Graph
from flatbench.curvature.operators.memory import LiveBytes
from flatbench.curvature.operators.pieces import Bytes, measured


@dataclass(frozen=True)
class Sizes:
    """What a piece takes, as functions of its number of elements.

    Attributes:
        state: a hidden state.
        held: between products, with no block's graph kept.
        graphs: of the graphs of one, two, ... blocks, from the last block on.
        tail: what the tail's product takes beside, without chunks of logits.
        chunk: what a chunk of logits takes; no more than ``TENSORS * CHUNK`` in all.
        lean, linked: what going through a block takes beside, without and with its graph.
    """

    state: Bytes
    held: Bytes
    graphs: Sequence[Bytes]
    tail: Bytes
    chunk: Bytes
    lean: Sequence[Bytes]
    linked: Sequence[Bytes]

    @property
    def blocks(self) -> int:
        """How many blocks there are to go through."""
        return len(self.graphs)

    def of(self, elements: int, kept: int) -> float:
        """What a piece of so many elements holds between products, with so many blocks' graphs kept."""
        graphs = self.graphs[kept - 1].of(elements) if kept else 0.0
        return self.held.of(elements) + graphs

    def transient(self, elements: int, kept: int, vectors: int = 1) -> float:
        """What a product with so many vectors takes beside: tangents, and the most of a block or the tail."""
        through = self.linked if kept == self.blocks else self.lean
        tail = self.tail.of(elements) + min(self.chunk.of(elements), TENSORS * CHUNK)
        most = max(tail, *(size.of(elements) for size in through))
        return vectors * self.state.of(elements) * (self.blocks + 1) + most


def sizes(
    build: Callable[[Any, Before], Graph | None],
    pieces: Sequence[Any],
    blocks: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    *,
    gauss_newton: bool,
    chunk: Callable[[], int],
    live: Callable[[float], AbstractContextManager[LiveBytes]],
    limit: float,
) -> Sizes | None:
    """Measure one or two rows of the piece with the largest rows; None where a loss has no terms.

    Args:
        chunk: bytes of the largest chunk of logits of what was measured last.
        live: counts bytes up to a limit.
        limit: two rows are measured within so many bytes.

    Raises NoChain, as `Blockwise.built`.
    """
    kinds: list[list[int]] = []

    def bytes_of(piece: Any) -> Sequence[float]:
        room = limit if cutting.rows(piece) > 1 else math.inf
        kinds[:], found = _measure(lambda b: build(piece, b), blocks, parameters, gauss_newton, live(room))
        if found:
            beside = TENSORS * chunk()
            found[2:3] = [max(found[2] - beside, 0), beside]
        return found

    found = measured(pieces, bytes_of)
    if not found:
        return None
    state, held, tail, chunks, *rest = found
    of_kind = list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
    by_block = {index: of_kind[number][0] for number, kind in enumerate(kinds) for index in kind}
    graphs: list[Bytes] = []
    for index in reversed(range(len(by_block))):
        graphs.append(by_block[index] + graphs[-1] if graphs else by_block[index])
    lean, linked = ([each[place] for each in of_kind] for place in (1, 2))
    return Sizes(state, held, graphs, tail, chunks, lean, linked)


def _measure(
    build: Build,
    blocks: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    gauss_newton: bool,
    counted: AbstractContextManager[LiveBytes],
) -> tuple[list[list[int]], list[float]]:
    """Kinds of blocks by their places; and bytes: state, held, tail, and by kind its graph, lean, linked."""
    vectors = [torch.zeros_like(parameter) for parameter in parameters]
    with counted as live:
        made = Blockwise.without_gradients(build, blocks, parameters, gauss_newton)
        if made is None:
            return [], []
        state = made.state_bytes()
        made.start_stem()
        # what is the gradient in a block's input is made later
        found: list[float] = [state, live.restart() + state * len(made)]
        made.tail_product(vectors)
        found.append(live.peak - live.now)
        kinds = made.kinds()
        for indices in kinds:
            index = indices[-1]
            step = made.rehearsal(index, vectors)
            before = live.restart()
            step()
            lean = live.peak - before
            before = live.restart()
            made.keep(index)
            graph = live.now - before
            before = live.restart()
            step()
            found += [graph, lean, live.peak - before]
            made.forget(index)
            del step
    return kinds, found
