"""How a curvature operator comes to its plan: what graphs take is measured, and the quickest way chosen.

The whole graph of a piece, kept, makes the quickest products and is taken where it fits. Else a model that is
a chain of blocks is gone through block by block, where that is quicker than to rebuild whole graphs; that it
is the same function is checked on a few rows first.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import memory as memory_
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.chain import NoChain, chains
from flatbench.curvature.operators.chain_check import Compared, differs, few_tokens
from flatbench.curvature.operators.chain_sizes import Sizes, sizes
from flatbench.curvature.operators.entropy import CHUNK, TENSORS
from flatbench.curvature.operators.graphs import Before, Graph
from flatbench.curvature.operators.head import Chunked, largest_head
from flatbench.curvature.operators.loss_checks import CheckedLoss
from flatbench.errors import InputError

log = logging.getLogger(__name__)

Products = Literal["auto", "exact", "differences"]

#: whether the losses of pieces have the mean of the batches' own
Agrees = Callable[[Sequence[Any]], bool]

#: a budget over the share that graphs get of it; bases of vectors get the rest
_BUDGET_PER_SHARE = 1.5
#: vectors that go through the blocks together: they share graphs that are rebuilt
TOGETHER = 4


class PlannedOperator(CheckedLoss):
    """An operator over batches that plans its products by what their graphs take."""

    model: nn.Module
    gauss_newton: bool = False
    _products: Products
    _chain: Sequence[nn.Module] = ()
    _heads: frozenset[int] = frozenset()
    _head_way: str = ""
    _smallest_share: float = math.inf
    #: the largest chunk of logits of the loss that was computed last, in bytes
    _chunk: int = 0
    #: bytes that a computation with the operator needs beside it
    _reserved: int = 0
    #: the most that measuring for the plan took, in bytes
    _measured_peak: int = 0
    #: whether it was told that no forward pass holds a whole batch
    _told_unseen: bool = False

    @abstractmethod
    def _build(self, batch: Any, before: Before = list) -> Graph | None:
        """The graph of a piece on the device; None for one whose loss has no terms.

        Args:
            before: variables that derivatives are taken in beside the parameters, and that stand before them.
        """

    @abstractmethod
    def _gradient(self, piece: Any) -> tuple[float, int, Sequence[Tensor | None]] | None:
        """Loss, terms and plain gradient of a piece; None without terms."""

    # -- the plan -----------------------------------------------------------------------------------------

    def _make_plan(self) -> planning.ProductPlan:
        """The quickest plan that fits. Raises InputError where none does."""
        self._measured_peak = 0
        plan = self._find_plan()
        return replace(plan, peak_bytes=max(plan.peak_bytes, self._measured_peak))

    def _find_plan(self) -> planning.ProductPlan:
        whole = [cutting.to_device(batch, self.device) for batch in self.batches]
        pieces = [piece for batch in whole for piece in self._strip_padding(batch)]
        padding = 1 - cutting.size_of(pieces) / max(cutting.size_of(whole), 1)
        budget = math.inf if self.memory is None else float(self.memory)
        room = budget - self._vectors()
        share = room / _BUDGET_PER_SHARE
        additive = functools.cache(lambda: self._additive(whole))

        def agrees(cut: Sequence[Any]) -> bool:
            return additive() and self._same_whole(whole, cut, self._unreserved(share))

        if self._products == "differences":
            return self._differences_plan(agrees, pieces, share, padding, "as asked")
        candidates = chains(self.model)
        limit = max(share, 0) if candidates else math.inf
        least, plan, refusal = self._whole_plan(agrees, pieces, share, padding, limit)
        if plan is not None and plan.graph == "kept":
            return plan
        walked, reason = None, "no blocks in a row"
        if candidates:
            walked, reason = self._blocks_plan(candidates, agrees, pieces, share, padding)

        def worse(plan: planning.ProductPlan) -> tuple[bool, float]:
            return max(plan.peak_bytes, plan.several_bytes) + self._reserved > budget, plan.cost

        if walked is not None and (plan is None or worse(walked) < worse(plan)):
            return walked
        if plan is not None:
            why = "its graphs are rebuilt in less time" if walked is not None else reason
            return replace(plan, way_reason=why)
        if refusal is not None:
            raise refusal
        if self._products == "exact":
            if least == math.inf and not self._chain:
                least, *_ = self._whole_plan(agrees, pieces, share, padding, math.inf)
            least = self._memory_for(min(least, self._smallest_share) if self._chain else least)
            raise InputError(
                f"memory: {memory_.readable(budget)} do not hold the graph of one example; about "
                f"{memory_.sufficient(least)} would, or products='differences'"
            )
        self._products = "differences"
        text = "one example's second-order graph exceeds the memory"
        return replace(self._differences_plan(agrees, pieces, share, padding, text), way_reason=reason)

    def _vectors(self, count: int = 4) -> int:
        """Bytes of vectors; four are those of a product: itself, its sum over pieces, one more to come."""
        return count * self.dimension * self.dtype.itemsize

    def _memory_for(self, share: float) -> float:
        """The budget that leaves graphs a share."""
        return share * _BUDGET_PER_SHARE + self._vectors()

    def _memory_with_rest(self, rest: float) -> int:
        """The budget of which so much is left when graphs have taken all of their share."""
        return math.ceil(rest * _BUDGET_PER_SHARE / (_BUDGET_PER_SHARE - 1))

    def _unreserved(self, share: float) -> float:
        """What graphs may take of their share if they can do with less, to leave what is reserved."""
        return max(min(share, share * _BUDGET_PER_SHARE - self._reserved), 0.0)

    def _cut(
        self,
        pieces: Sequence[Any],
        fitting: Callable[[float], list[Any] | None],
        agrees: Agrees,
        share: float,
    ) -> list[Any] | None:
        """The pieces cut to fit what is not reserved, or else the share; None if they cannot be.

        Raises InputError where they could, but the loss is no mean of its parts' losses.
        """
        refusal = None
        for room in (self._unreserved(share), share):
            cut = fitting(room)
            if cut is not None:
                if len(cut) == len(pieces) or agrees(cut):
                    return cut
                refusal = InputError(
                    "memory: a batch must be cut to fit, but its loss is not the mean over its examples; "
                    "give smaller batches or more memory"
                )
        if refusal is not None:
            raise refusal
        return None

    def _same_whole(self, whole: Sequence[Any], cut: Sequence[Any], share: float) -> bool:
        """Whether the pieces' losses have the mean of the batches' own, of as many rows together as fit.

        A loss of the 32 hardest rows of a batch, or one in which a rare class weighs more, may be the mean of
        its parts on any few rows.
        """
        parts = [part for batch in whole for part in self._largest_parts(batch, share)]
        if not self._same_loss(parts, cut):
            return False
        if len(parts) > len(whole) and not self._told_unseen:
            self._told_unseen = True
            warnings.warn(
                "a batch is cut to fit the memory, which holds no forward pass over all of it: that its loss "
                "is the mean of its rows was seen on parts of it alone; use smaller batches or more memory",
                stacklevel=2,
            )
        return True

    def _largest_parts(self, batch: Any, room: float) -> list[Any]:
        """A batch, cut only where a forward pass over it would take more than the room."""
        rows = cutting.rows(batch)
        few = min(rows, 8)
        if room == math.inf:
            return [batch]
        with torch.no_grad(), self._count_live_bytes() as live:
            self._evaluate(cutting.chosen(batch, slice(0, few)))
        count = math.ceil(live.peak * rows / few / max(room, 1.0))
        return planning.split(batch, min(max(count, 1), rows))

    def _differences_plan(
        self,
        agrees: Agrees,
        pieces: Sequence[Any],
        share: float,
        padding: float,
        reason: str,
    ) -> planning.ProductPlan:
        (size,) = planning.measured(pieces, self._gradient_bytes)
        weights = sum(p.numel() * p.element_size() for p in self._parameters)
        cut = self._cut(pieces, lambda room: planning.fitting(pieces, size, room - weights), agrees, share)
        if cut is None:
            least = max(size(cutting.chosen(piece, slice(0, 1))) for piece in pieces) + weights
            raise InputError(
                f"memory: {memory_.readable(self.memory or 0)} do not hold the graph of one example's "
                f"gradient; about {memory_.sufficient(self._memory_for(least))} would"
            )
        return planning.differences(cut, size, weights, padding, reason)

    def _whole_plan(
        self,
        agrees: Agrees,
        pieces: list[Any],
        share: float,
        padding: float,
        limit: float,
    ) -> tuple[float, planning.ProductPlan | None, InputError | None]:
        """What one example takes, and the plan with whole graphs; or why there is none."""
        try:
            graph, transient = planning.measured(pieces, lambda piece: self._graph_bytes(piece, limit))
        except memory_.TooLarge:
            return math.inf, None, None
        need, beside = graph + transient, self._chunk_bytes()
        least = max(need(cutting.chosen(piece, slice(0, 1))) for piece in pieces) + beside
        try:
            cut = self._cut(pieces, lambda room: planning.fitting(pieces, need, room - beside), agrees, share)
        except InputError as refusal:
            return least, None, refusal
        if cut is None:
            return least, None, None
        if self.device.type == "cpu":
            smaller = planning.fitting(cut, graph, planning.CACHED + graph.fixed)
            if smaller is not None and len(smaller) > len(cut) and agrees(smaller):
                cut = smaller
        plan = planning.arrange(cut, graph, transient, self._unreserved(share) - beside, padding)
        # the sum over pieces and the gradient
        return least, replace(plan, peak_bytes=plan.peak_bytes + int(beside) + self._vectors(2)), None

    def _chunk_bytes(self) -> float:
        """Bytes that chunks of logits take."""
        return float(TENSORS * CHUNK) if self._heads else 0.0

    # -- block by block -----------------------------------------------------------------------------------

    def _blocks_plan(
        self,
        candidates: Sequence[Sequence[nn.Module]],
        agrees: Agrees,
        pieces: list[Any],
        share: float,
        padding: float,
    ) -> tuple[planning.ProductPlan | None, str]:
        """The plan block by block; or None and the reason."""
        found, reason = self._find_chain(candidates, pieces, share)
        if found is None:
            log.info("products by the whole graph: %s", reason)
            return None, reason
        size: Sizes = found

        def need(elements: int) -> float:
            return size.of(elements, 0) + size.transient(elements, 0)

        rows = [cutting.size_of([cutting.chosen(piece, slice(0, 1))]) for piece in pieces]
        self._smallest_share = max(map(need, rows))
        if self._smallest_share > share:
            return None, "one example does not fit block by block either"

        def fitting(room: float) -> list[Any]:
            cut: list[Any] = []
            for piece, row in zip(pieces, rows, strict=True):
                counts = range(row, row * cutting.rows(piece) + 1, row)
                fit = max(bisect.bisect_right(counts, room, key=need), 1)
                cut += planning.split(piece, math.ceil(cutting.rows(piece) / fit))
            return cut

        try:
            cut = self._cut(pieces, fitting, agrees, share)
        except InputError:
            return None, "a batch must be cut to fit, but its loss is not the mean over its examples"
        assert cut is not None

        def vectors(count: int, anew: bool) -> int:
            # results by parameter and their sums over pieces, the gradient, and that of a piece made anew
            return self._vectors(2 * count + 1 + anew)

        # they take of what the graphs leave
        wanted = self._unreserved(share)
        budget = math.inf if self.memory is None else float(self.memory)
        together = TOGETHER
        while together > 1 and vectors(together, False) > budget - wanted - self._reserved:
            together -= 1
        return planning.arrange_blocks(cut, size, wanted, padding, together, vectors), ""

    def _find_chain(
        self, candidates: Sequence[Sequence[nn.Module]], pieces: Sequence[Any], share: float = math.inf
    ) -> tuple[Sizes | None, str]:
        """The first candidate that is the model's function, with what a piece takes; else None and why."""
        few = few_tokens(pieces, largest_head(self.model))
        reasons = []
        for blocks in candidates:
            try:
                difference = differs(
                    self._build,
                    self._whole_product,
                    blocks,
                    self._parameters,
                    few,
                    gauss_newton=self.gauss_newton,
                    counted=self._count_live_bytes,
                    limit=share,
                )
                if difference:
                    raise NoChain(difference)
                size = sizes(
                    self._build,
                    pieces,
                    blocks,
                    self._parameters,
                    gauss_newton=self.gauss_newton,
                    chunk=lambda: self._chunk,
                    live=self._count_live_bytes,
                    limit=share,
                )
                if size is None or not size.blocks:
                    raise NoChain("no block holds, or follows, a parameter of the space")
            except NoChain as no:
                reasons.append(f"{len(blocks)} {type(blocks[0]).__name__}: {no}")
                continue
            self._chain = blocks
            return size, ""
        return None, f"no chain of blocks ({'; '.join(reasons)})"

    def _whole_product(self, batch: Any, vectors: Sequence[Tensor] | None) -> Compared | None:
        """What a chain is compared with: of the whole graph with whole logits."""
        weights, self._heads = self._heads, frozenset()
        try:
            with torch.no_grad():
                kind = self._evaluate(batch)[0].dtype
            if vectors is None:
                found = self._gradient(batch)
                return None if found is None else (found[0], found[2], None, kind)
            whole = self._build(batch)
            if whole is None:
                return None
            product = whole.product(vectors, keep=False)
            return whole.loss, [None if g is None else g.detach() for g in whole.gradients], product, kind
        finally:
            self._heads = weights

    @contextlib.contextmanager
    def _in_chunks(self) -> Iterator[None]:
        """Inside, logits over a large vocabulary do not exist whole where their use is known."""
        if not self._heads:
            yield
            return
        with Chunked(self._heads) as mode:
            yield
        self._head_way = mode.told or self._head_way
        self._chunk = mode.chunk

    # -- what is measured ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _count_live_bytes(self, limit: float = math.inf) -> Iterator[memory_.LiveBytes]:
        """Inside, bytes are counted; what measuring took is remembered."""
        with memory_.counted(limit, self.device) as live:
            try:
                yield live
            finally:
                self._measured_peak = max(self._measured_peak, live.highest)

    def _graph_bytes(self, piece: Any, limit: float = math.inf) -> tuple[float, float]:
        """What a piece's graph takes, and a product beside it. Raises TooLarge beyond the limit."""
        vectors = [torch.zeros_like(parameter) for parameter in self._parameters]
        with self._count_live_bytes(limit) as live:
            graph = self._build(piece)
            if graph is None:
                return 0.0, 0.0
            held = live.restart()
            graph.product(vectors, keep=True)
            return held, max(live.peak - held - TENSORS * self._chunk, 0)

    def _gradient_bytes(self, piece: Any) -> tuple[float]:
        """What a piece's gradient takes."""
        with self._count_live_bytes() as live:
            self._gradient(piece)
            return (live.peak,)
