"""How a curvature operator comes to its plan: what graphs take is measured, and the quickest way chosen.

The whole graph of a piece, kept, makes the quickest products and is taken where it fits. Else a model that is
a chain of blocks is gone through block by block, where that is quicker than to rebuild whole graphs; that it
is the same function is checked on a few rows first.
"""

from __future__ import annotations

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import memory as memory_
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.chain import NoChain, chains
from flatbench.curvature.operators.chain_check import differs, few_tokens
from flatbench.curvature.operators.chain_sizes import Sizes, sizes
from flatbench.curvature.operators.entropy import transient_bytes
from flatbench.curvature.operators.graphs import Before, Graph
from flatbench.curvature.operators.head import Chunked
from flatbench.errors import FlatbenchError, InputError

log = logging.getLogger(__name__)

Products = Literal["auto", "exact", "differences"]

#: a budget over the share that graphs get of it; bases of vectors get the rest
_OVER = 1.5


class PlannedOperator(SymmetricOperator):
    """An operator over batches that plans its products by what their graphs take."""

    model: nn.Module
    batches: list[Any]
    gauss_newton: bool = False
    _parameters: list[nn.Parameter]
    _products: Products
    _shorten: bool
    _chain: Sequence[nn.Module] = ()
    _heads: frozenset[int] = frozenset()
    _head_told: str = ""
    #: whether the loss came without its terms, which are taken to be the batch's rows then
    _alone: bool = False
    _least: float = math.inf

    @abstractmethod
    def _build(self, batch: Any, before: Before = list) -> Graph | None:
        """The graph of a piece on the device; None for one whose loss has no terms.

        Args:
            before: variables that derivatives are taken in beside the parameters, and that stand before them.
        """

    @abstractmethod
    def _evaluate(self, batch: Any) -> tuple[Tensor, int]:
        """Mean loss and terms of a batch on the device."""

    @abstractmethod
    def _finite(self, batch: Any) -> tuple[Tensor, int] | None:
        """Loss and terms of a piece; None without terms."""

    # -- the plan -----------------------------------------------------------------------------------------

    def _make_plan(self) -> planning.Plan:
        whole = [cutting.to_device(batch, self.device) for batch in self.batches]
        pieces = [piece for batch in whole for piece in self._strip_padding(batch)]
        padding = 1 - cutting.size_of(pieces) / max(cutting.size_of(whole), 1)
        budget = math.inf if self.memory is None else float(self.memory)
        room = budget - self._vectors()
        share = room / _OVER
        if self._products == "differences":
            return self._differences_plan(pieces, share, padding, "as asked")
        candidates = chains(self.model)
        limit = max(share, 0) / (1 + planning.TRANSIENT) if candidates else math.inf
        size, plan, refusal = self._whole_plan(whole, pieces, share, padding, limit)
        if plan is not None and plan.graph == "kept":
            return plan
        walked, reason = None, "no blocks in a row"
        if candidates:
            walked, reason = self._blocks_plan(candidates, whole, pieces, share, padding)
        if walked is not None and (plan is None or walked.cost < plan.cost):
            return walked
        if plan is not None:
            why = "its graphs are rebuilt in less time" if walked is not None else reason
            return replace(plan, way_reason=why)
        if refusal is not None:
            raise refusal
        if self._products == "exact":
            if size is None and not self._chain:
                size = planning.GraphSize.measured(pieces, self._bytes)
            rows = [cutting.chosen(piece, slice(0, 1)) for piece in pieces]
            largest = math.inf if size is None else max(map(size, rows))
            least = largest * (1 + planning.TRANSIENT) + self._beside()
            least = self._memory_for(min(least, self._least) if self._chain else least)
            raise InputError(
                f"memory: {memory_.readable(budget)} do not hold the graph of one example; about "
                f"{memory_.sufficient(least)} would, or products='differences'"
            )
        self._products = "differences"
        text = "one example's second-order graph exceeds the memory"
        return replace(self._differences_plan(pieces, share, padding, text), way_reason=reason)

    def _vectors(self) -> int:
        """Bytes of four vectors: those of a product and of the sum."""
        return 4 * self.dimension * self.dtype.itemsize

    def _memory_for(self, share: float) -> float:
        """The budget that leaves graphs a share."""
        return share * _OVER + self._vectors()

    def _memory_with_rest(self, rest: float) -> int:
        """The budget of which so much is left when graphs have taken all of their share."""
        return math.ceil(rest * _OVER / (_OVER - 1))

    def _differences_plan(
        self, pieces: Sequence[Any], share: float, padding: float, reason: str
    ) -> planning.Plan:
        size = planning.GraphSize.measured(pieces, self._bytes)
        weights = sum(p.numel() * p.element_size() for p in self._parameters)
        try:
            return planning.differences(pieces, size, share, weights, padding, reason)
        except planning.BudgetError as error:
            raise InputError(
                f"memory: {memory_.readable(self.memory or 0)} do not hold the graph of one example's "
                f"gradient; about {memory_.sufficient(self._memory_for(error.least))} would"
            ) from None

    def _whole_plan(
        self, whole: Sequence[Any], pieces: list[Any], share: float, padding: float, limit: float
    ) -> tuple[planning.GraphSize | None, planning.Plan | None, InputError | None]:
        """What a piece's whole graph takes, and the plan with whole graphs; or why there is none."""
        try:
            size = planning.GraphSize.measured(pieces, lambda piece: self._bytes(piece, limit))
        except memory_.TooLarge:
            return None, None, None
        share -= self._beside()
        cut = planning.fitting(pieces, size, share / (1 + planning.TRANSIENT))
        if cut is None:
            return size, None, None
        if len(cut) > len(pieces) and not self._additive(whole):
            return size, None, _not_additive()
        if self.device.type == "cpu":
            smaller = planning.fitting(cut, size, planning.CACHED + size.fixed)
            if smaller is not None and len(smaller) > len(cut) and self._additive(whole):
                cut = smaller
        plan = planning.arrange(cut, size, share, padding)
        return size, replace(plan, peak_bytes=plan.peak_bytes + int(self._beside())), None

    def _beside(self) -> float:
        """Bytes that a chunk of logits takes."""
        return float(transient_bytes()) if self._heads else 0.0

    # -- block by block -----------------------------------------------------------------------------------

    def _blocks_plan(
        self,
        candidates: Sequence[Sequence[nn.Module]],
        whole: Sequence[Any],
        pieces: list[Any],
        share: float,
        padding: float,
    ) -> tuple[planning.Plan | None, str]:
        """The plan block by block; or None and the reason."""
        found, reason = self._find_chain(candidates, pieces)
        if found is None:
            log.info("products by the whole graph: %s", reason)
            return None, reason
        beside = self._beside()
        size: Sizes = found

        def need(piece: Any) -> float:
            count = cutting.size_of([piece])
            return size.of(count, 0) + size.transient(count) + beside

        rows = [cutting.chosen(piece, slice(0, 1)) for piece in pieces]
        self._least = max(map(need, rows))
        if self._least > share:
            return None, "one example does not fit block by block either"
        cut: list[Any] = []
        for piece, row in zip(pieces, rows, strict=True):
            fit = max(int((share - beside) // max(need(row) - beside, 1)), 1)
            cut += planning.split(piece, math.ceil(cutting.rows(piece) / fit))
        if len(cut) > len(pieces) and not self._additive(whole):
            return None, "a batch must be cut to fit, but its loss is not the mean over its examples"
        return planning.arrange_blocks(cut, size, share, beside, padding), ""

    def _find_chain(
        self, candidates: Sequence[Sequence[nn.Module]], pieces: Sequence[Any]
    ) -> tuple[Sizes | None, str]:
        """The first candidate that is the model's function, with what a piece takes; else None and why."""
        few = few_tokens(pieces)
        widest = max(pieces, key=lambda piece: cutting.size_of([piece]) / cutting.rows(piece))
        row = cutting.chosen(widest, slice(0, 1))
        reasons = []
        for blocks in candidates:
            try:
                difference = differs(
                    self._build, self._plainly, blocks, self._parameters, few, gauss_newton=self.gauss_newton
                )
                if difference:
                    raise NoChain(difference)
                size = sizes(
                    lambda before: self._build(row, before),
                    blocks,
                    self._parameters,
                    gauss_newton=self.gauss_newton,
                    elements=cutting.size_of([row]),
                    model=self.model,
                )
                if size is None or not size.blocks:
                    raise NoChain("no block holds, or follows, a parameter of the space")
            except NoChain as no:
                reasons.append(f"{len(blocks)} {type(blocks[0]).__name__}: {no}")
                continue
            self._chain = blocks
            return size, ""
        return None, f"no chain of blocks ({'; '.join(reasons)})"

    def _plainly(self, batch: Any) -> tuple[Graph | None, torch.dtype]:
        """The whole graph with whole logits, and the loss's type."""
        weights, self._heads = self._heads, frozenset()
        try:
            with torch.no_grad():
                kind = self._evaluate(batch)[0].dtype
            return self._build(batch), kind
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
        self._head_told = mode.told or self._head_told

    # -- what is compared and measured --------------------------------------------------------------------

    def _strip_padding(self, batch: Any) -> list[Any]:
        """The batch without padding, if a comparison on a few rows finds the same loss."""
        pieces = planning.without_padding(batch) if self._shorten else [batch]
        if len(pieces) == 1 and pieces[0] is batch:
            return [batch]
        sample = planning.sample_of(batch)
        if not self._same_loss([sample], planning.without_padding(sample)):
            log.info("padding is kept: the loss depends on it")
            return [batch]
        return pieces

    def _additive(self, whole: Sequence[Any]) -> bool:
        """Whether a batch's loss is the mean of its parts' losses, compared on a few of its rows."""
        samples = [planning.sample_of(batch) for batch in whole]
        return all(self._same_loss([sample], planning.split(sample, 2)) for sample in samples)

    def _check_loss(self) -> None:
        """Raise InputError for a loss that is random, or no mean over its rows.

        Looked at on a few rows; batches that cannot be cut into rows are taken whole.
        """
        whole = [cutting.to_device(batch, self.device) for batch in self.batches]
        try:
            sample = planning.sample_of(whole[0])
            again = self._same_loss([sample], [sample])
            mean = len(whole) == 1 or self._additive(whole)
        except (InputError, FlatbenchError):
            return
        if not again:
            raise InputError(
                "the loss is random: two passes over the same rows give different values; take dropout and "
                "noise out of it (layers such as nn.Dropout are switched off by themselves)"
            )
        if not mean:
            raise InputError(
                "the loss of a batch is not the mean over its rows, and there are several batches: return "
                "(mean loss, number of terms that it is the mean of) instead of the loss alone"
            )

    def _same_loss(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        with torch.no_grad():
            first, second = (self._mean([self._evaluate(piece) for piece in part]) for part in (one, other))
        if first is None or second is None:
            return first is second
        eps = torch.finfo(min((p.dtype for p in self._parameters), key=lambda d: -torch.finfo(d).eps)).eps
        return bool(abs(first - second) <= 4 * eps**0.8 * (abs(first) + eps**0.2))

    @staticmethod
    def _mean(seen: Sequence[tuple[Tensor, int]]) -> float | None:
        total = sum(terms for _, terms in seen)
        return sum(float(loss) * terms for loss, terms in seen if terms) / total if total else None

    def _bytes(self, piece: Any, limit: float = math.inf) -> int:
        """What a piece's graph takes. Raises TooLarge where that is more than the limit."""
        counter = memory_.SavedBytes(self.model.parameters(), limit)
        if self._products == "differences":
            with counter.counted():
                found = self._finite(piece)
            return counter.total if found else 0
        with counter.counted():
            graph = self._build(piece)
        if graph is not None:
            for gradient in graph.gradients:
                if gradient is not None:
                    counter.add(gradient)
        return counter.total


def _not_additive() -> InputError:
    return InputError(
        "memory: a batch must be cut to fit, but its loss is not the mean over its examples; give "
        "smaller batches or more memory"
    )
