"""Curvature of a loss over many batches: what Hessian and Gauss-Newton products have in common."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import memory as memory_
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.differences import Differences
from flatbench.curvature.operators.entrance import entered
from flatbench.curvature.operators.idle import why_unused
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.precision import UNITS, Precision, unit_of_half, why_coarse
from flatbench.curvature.operators.spaces import Space, parameters_of
from flatbench.errors import FlatbenchError, InputError

log = logging.getLogger(__name__)

#: (model, batch) -> the batch's mean loss, or (mean loss, number of terms it is the mean of)
Loss = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, int]"]
Products = Literal["auto", "exact", "differences"]

#: how torch says that an operation has no second derivative
_SECOND_DERIVATIVE_ERRORS = (
    "derivative for", "once_differentiable", "double backward", "Double backward", "twice",
)  # fmt: skip


def lacks_second_derivative(error: RuntimeError) -> bool:
    """Whether torch complains about an operation that can be differentiated only once."""
    return any(text in str(error) for text in _SECOND_DERIVATIVE_ERRORS)


class Graph(Protocol):
    """One piece's loss with what a product needs."""

    loss: float
    terms: int
    gradients: Sequence[Tensor | None]

    def product(self, vectors: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """Product with the piece's matrix, a tensor per parameter; ``keep`` for further products."""


class LossOperator(SymmetricOperator):
    """The curvature matrix of ``L(w) = Σ_b n_b·L_b(w) / Σ_b n_b``, b the batches and n_b their terms.

    Args:
        model: left exactly as it was found; in evaluation mode while the operator is open.
        batches: mappings (BatchEncoding too), tuples, tensors; moved to the model's device. An iterable is
            read once.
        space: see `flatbench.curvature.operators.spaces.Space`.
        only: chooses among the space's parameters by name.
        products: ``exact`` (double backward), ``differences`` (central differences of gradients), or
            ``auto``: exact where second derivatives exist and the memory suffices.
        memory: budget in bytes for graphs, weights' copies and the vectors of a computation; half of what is
            available if None.
        shorten: leave out columns of padding, by ``attention_mask``, where a comparison of losses shows that
            they do not matter.
        precision: ``float32``: a model in half precision is computed in float32 while the operator is open,
            through a copy; ``as_stored``: as it is, and ``relative_error`` says how coarse that is.

    Raises:
        InputError: no batches, no parameters in the space, a batch that the model rejects.
        NotApplicableError: the model's function in the space is another, see `entrance.entered`.
        FlatbenchError: a loss is not finite, or depends on no parameter of the space.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Iterable[Any],
        *,
        space: Space = "all",
        only: Callable[[str], bool] | None = None,
        products: Products = "auto",
        memory: int | None = None,
        shorten: bool = True,
        precision: Precision = "float32",
    ) -> None:
        self.model, self.space, self._name_filter = model, space, only
        self.batches = [batch for batch in batches if cutting.rows(batch)]
        if not self.batches:
            raise InputError("there are no examples: the batches are empty")
        self._loss, self._products, self._products_request, self._shorten = loss, products, products, shorten
        parameters = parameters_of(model, space, only)
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.dimension = sum(shape.numel() for shape in self.shapes.values())
        self._precision = precision
        kinds = {parameter.dtype for parameter in parameters.values()}
        if precision == "float32":
            kinds = {torch.promote_types(kind, torch.float32) for kind in kinds}
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        self.precision = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        self.device = next(iter(parameters.values())).device
        self.memory = memory_.default_budget(self.device) if memory is None else memory
        self._parameters: list[nn.Parameter] = []
        self._stack = contextlib.ExitStack()
        self._plan: planning.Plan | None = None
        self._graphs: list[Graph] = []
        self._differences: Differences | None = None
        self._point: tuple[float, Tensor] | None = None

    # -- what a kind of curvature says --------------------------------------------------------------------

    @abstractmethod
    def _build(self, batch: Any) -> Graph | None:
        """The graph of a piece on the device; None for one whose loss has no terms."""

    @abstractmethod
    def restricted(self, only: Callable[[str], bool]) -> Self:
        """The diagonal block of the parameters that ``only`` chooses by name, as an operator."""

    # -- opening and closing ------------------------------------------------------------------------------

    def _open(self) -> None:
        with contextlib.ExitStack() as stack:
            parameters = stack.enter_context(
                entered(
                    self.model,
                    self.space,
                    self._name_filter,
                    loss=lambda batch: self._evaluate(cutting.to_device(batch, self.device)),
                    batches=self.batches,
                    twice_differentiable=self._products != "differences",
                    curvature=True,
                    precision=self._precision,
                )
            )
            self._parameters = list(parameters.values())
            self.coarse = why_coarse(self.model)
            self.relative_error = self._coarse_error = UNITS * unit_of_half(self.model)
            stack.enter_context(torch.enable_grad())
            self._stack = stack.pop_all()

    def _close(self) -> None:
        self._plan, self._graphs, self._differences, self._point = None, [], None, None
        self._parameters, self._products = [], self._products_request
        self._stack.close()

    # -- planning -----------------------------------------------------------------------------------------

    @property
    def plan(self) -> planning.Plan:
        """How products are made and what memory they need; made at the first call while open.

        Raises InputError outside of ``with operator:``.
        """
        if self._depth == 0:
            raise InputError("an operator has a plan only while it is open: inside 'with operator:'")
        if self._plan is None:
            try:
                self._plan = self._make_plan()
                log.info("%s", self._plan.describe())
                for piece in self._plan.kept:
                    graph = self._build(piece)
                    if graph is not None:
                        self._graphs.append(graph)
            except RuntimeError as error:
                if self._products != "auto" or not lacks_second_derivative(error):
                    raise
                self._fall_back(str(error))
        return self._plan  # type: ignore[return-value]

    def reserved_memory(self) -> int:
        """Bytes of the operator's graphs and of a product's intermediate results."""
        with self:
            return self.plan.peak_bytes

    def _make_plan(self) -> planning.Plan:
        whole = [cutting.to_device(batch, self.device) for batch in self.batches]
        pieces = [piece for batch in whole for piece in self._strip_padding(batch)]
        padding = 1 - cutting.size_of(pieces) / max(cutting.size_of(whole), 1)
        budget = math.inf if self.memory is None else float(self.memory)
        # four vectors: those of a product and of the sum; graphs get two thirds, bases of vectors the rest
        room = budget - 4 * self.dimension * self.dtype.itemsize
        share = room * 2 / 3
        size = planning.GraphSize.measured(pieces, self._bytes)
        weights = sum(p.numel() * p.element_size() for p in self._parameters)
        if self._products == "differences":
            return planning.differences(pieces, size, share, weights, padding, "as asked")
        cut = planning.fitting(pieces, size, share / (1 + planning.TRANSIENT))
        if cut is None:
            if self._products == "exact":
                least = max(size(cutting.chosen(p, slice(0, 1))) for p in pieces)
                raise InputError(
                    f"memory: {memory_.readable(budget)} do not hold the graph of one example; about "
                    f"{memory_.readable(least * 2.5)} would, or products='differences'"
                )
            reason = "one example's second-order graph exceeds the memory"
            self._products = "differences"
            size = planning.GraphSize.measured(pieces, self._bytes)
            return planning.differences(pieces, size, share, weights, padding, reason)
        if len(cut) > len(pieces) and not self._additive(whole):
            raise InputError(
                "memory: a batch must be cut to fit, but its loss is not the mean over its examples; give "
                "smaller batches or more memory"
            )
        if self.device.type == "cpu":
            smaller = planning.fitting(cut, size, planning.CACHED + size.fixed)
            if smaller is not None and len(smaller) > len(cut) and self._additive(whole):
                cut = smaller
        return planning.arrange(cut, size, share, padding)

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

    def _bytes(self, piece: Any) -> int:
        counter = memory_.SavedBytes(self.model.parameters())
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

    # -- the loss -----------------------------------------------------------------------------------------

    def _evaluate(self, batch: Any) -> tuple[Tensor, int]:
        """Mean loss and terms of a batch on the device. Raises InputError if the model rejects it."""
        try:
            with losses_in_float32(self.model):
                found = self._loss(self.model, batch)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            shown = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(f"the model rejects a batch: {shown}") from error
        loss, terms = found if isinstance(found, tuple) else (found, cutting.rows(batch))
        if loss.numel() != 1:
            raise InputError(f"the loss must be one number, not of shape {tuple(loss.shape)}")
        return loss.reshape(()), int(terms)

    def _finite(self, batch: Any) -> tuple[Tensor, int] | None:
        """Loss and terms of a piece; None without terms. Raises FlatbenchError if it is not finite."""
        loss, terms = self._evaluate(batch)
        if terms == 0:
            return None
        if not bool(torch.isfinite(loss.detach())):
            raise FlatbenchError(f"the loss is {float(loss.detach())}{why_coarse(self.model)}")
        return loss, terms

    def _gradient(self, piece: Any) -> tuple[float, int, Sequence[Tensor | None]] | None:
        """Loss, terms and plain gradient of a piece."""
        found = self._finite(piece)
        if found is None:
            return None
        loss, terms = found
        parts: Sequence[Tensor | None] = [None] * len(self._parameters)
        if loss.requires_grad:
            parts = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        return float(loss.detach()), terms, parts

    def point(self) -> tuple[float, Tensor]:
        """L and its gradient ``(n,)`` at the weights as they are."""
        with self:
            if self._point is None:
                seen = [(g.loss, g.terms, g.gradients) for g in (self.plan, self._graphs)[1]]
                for piece in self.plan.rebuilt:
                    found = self._gradient(piece)
                    if found is not None:
                        seen.append(found)
                self._point = self._mean_over_terms(seen)
            return self._point

    def _mean_over_terms(
        self, seen: Sequence[tuple[float, int, Sequence[Tensor | None]]]
    ) -> tuple[float, Tensor]:
        total = sum(terms for _, terms, _ in seen)
        if total == 0:
            raise FlatbenchError("the loss is the mean of no terms")
        if all(part is None for _, _, parts in seen for part in parts):
            cause = why_unused(self.model, functools.partial(self._evaluate, self.batches[0]))
            raise FlatbenchError(f"the loss depends on no parameter of the space{cause}")
        gradient = self._zeros()
        for _, terms, parts in seen:
            self._accumulate(gradient, parts, terms / total)
        return sum(loss * terms for loss, terms, _ in seen) / total, gradient

    # -- products -----------------------------------------------------------------------------------------

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector ``(n,)`` in the shapes of the parameters, in the order of `shapes`."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes.values(), strict=True))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.dimension, dtype=self.dtype, device=self.device)

    def _accumulate(self, total: Tensor, parts: Sequence[Tensor | None], weight: float) -> None:
        """Add ``weight · parts`` to a flat vector, in the vector's precision."""
        for own, part in zip(self.split(total), parts, strict=True):
            if part is not None:
                own.add_(part.detach(), alpha=weight)

    def _product(self, vector: Tensor) -> Tensor:
        if self._differences is None and self.plan.method == "double backward":
            try:
                return self._exact(vector)
            except RuntimeError as error:
                if self._products != "auto" or not lacks_second_derivative(error):
                    raise
                self._fall_back(str(error))
        return self._by_differences(vector)

    def _exact(self, vector: Tensor) -> Tensor:
        parts = self.split(vector)
        vectors = [part.to(p.dtype) for part, p in zip(parts, self._parameters, strict=True)]
        total, terms = self._zeros(), 0
        self.point()  # says what is wrong with the loss before anything else fails
        for graph in self._graphs:
            self._accumulate(total, graph.product(vectors, keep=True), graph.terms)
            terms += graph.terms
        for piece in self.plan.rebuilt:
            built = self._build(piece)
            if built is not None:
                self._accumulate(total, built.product(vectors, keep=False), built.terms)
                terms += built.terms
            del built  # before the next one is made
        return total.div_(terms)

    def _fall_back(self, message: str) -> None:
        """Use differences from now on, because an operation has no second derivative."""
        self._graphs = []
        self._products = "differences"
        self._plan = replace(
            self._make_plan(), reason=f"no second derivative: {' '.join(message.split())[:120]}"
        )
        log.info("%s", self._plan.describe())

    def _by_differences(self, vector: Tensor) -> Tensor:
        if self._differences is None:
            self._differences = Differences(self._parameters, self._gradient_now)
            self.relative_error = self._differences.choose_step(self.point()[1]) + self._coarse_error
            log.info(
                "step %.1e, relative error of a product about %.0e",
                self._differences.step,
                self.relative_error,
            )
        return self._differences.product(vector)

    def _gradient_now(self) -> Tensor:
        """The gradient at the weights as they are now, wherever they have been moved to."""
        found = [self._gradient(piece) for piece in self.plan.rebuilt]
        return self._mean_over_terms([each for each in found if each is not None])[1]

    # -- blocks -------------------------------------------------------------------------------------------

    def blocks(self) -> dict[str, Self]:
        """The diagonal blocks of the matrix, one per module that holds parameters of the space, by name."""
        owners: dict[str, list[str]] = {}
        for name in self.shapes:
            owners.setdefault(name.rpartition(".")[0], []).append(name)
        return {owner: self.restricted(set(names).__contains__) for owner, names in owners.items()}
