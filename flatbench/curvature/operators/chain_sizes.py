"""Memory of products block by block, measured on one piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from flatbench.curvature.operators.blockwise import Blockwise, Build
from flatbench.curvature.operators.chain import Walk
from flatbench.curvature.operators.memory import SavedBytes
from flatbench.curvature.operators.pieces import TRANSIENT


@dataclass(frozen=True)
class Sizes:
    """Bytes of one piece, of which the parts that grow with it are told apart from those that do not.

    Attributes:
        elements: of the piece, as `flatbench.curvature.operators.batches.size_of` counts them.
        state: a hidden state.
        blocks: how many blocks there are to go through.
        graph: the largest graph of a block.
        fixed: of that, what has the size of the block's parameters in the space.
        tail: the graph of what is behind the blocks.
        stem: what has the size of the embeddings, where they are in the space.
    """

    elements: int
    state: int
    blocks: int
    graph: int
    fixed: int
    tail: int
    stem: int

    def of(self, elements: int, kept: int) -> float:
        """What a piece of so many elements holds between products, with so many blocks' graphs kept."""
        share = elements / self.elements
        states = share * self.state * (2 * self.blocks + 1)
        return states + share * self.tail + self.stem + kept * (share * self.graph + self.fixed)

    def transient(self, elements: int) -> float:
        """What a product takes beside: tangents, one block's graph, or the tail's intermediate results."""
        share = elements / self.elements
        block = (1 + TRANSIENT) * (share * self.graph + self.fixed)
        return share * self.state * (self.blocks + 1) + max(block, TRANSIENT * share * self.tail)


def sizes(
    build: Build,
    blocks: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    *,
    gauss_newton: bool,
    elements: int,
    model: nn.Module,
) -> Sizes | None:
    """Measure a piece of so many elements; None where its loss has no terms. Raises NoChain, as `built`."""
    walk, counter = Walk(blocks), SavedBytes(model.parameters())
    with walk.intercepted(), counter.counted():
        tail = build(lambda: [walk.last()])
    if tail is None:
        return None
    made = Blockwise(walk, tail, parameters, gauss_newton)
    largest, fixed = 0, 0
    graphs = made.linked()
    while True:
        own = SavedBytes(model.parameters())
        with own.counted():
            found = next(graphs, None)
        if found is None:
            break
        if own.total >= largest:
            largest, fixed = own.total, sum(p.numel() * p.element_size() for p in found[1])
        del found  # before the next one is made
    return Sizes(elements, made.state_bytes(), len(made), largest, fixed, counter.total, made.stem_bytes())
