"""Curvature of a loss over many batches: what Hessian and Gauss-Newton products have in common."""

from __future__ import annotations

import contextlib
import functools
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import memory as memory_
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.blockwise import Blockwise
from flatbench.curvature.operators.chain import without_cache
from flatbench.curvature.operators.differences import Differences
from flatbench.curvature.operators.entrance import entered
from flatbench.curvature.operators.graphs import Graph, lacks_second_derivative
from flatbench.curvature.operators.head import heads
from flatbench.curvature.operators.idle import why_unused
from flatbench.curvature.operators.losses import checked, losses_in_float32, transformers_loss
from flatbench.curvature.operators.offloaded import device_of
from flatbench.curvature.operators.planned import PlannedOperator, Products
from flatbench.curvature.operators.precision import (
    UNITS,
    Precision,
    half_types,
    unit_of_half,
    why_coarse,
)
from flatbench.curvature.operators.spaces import Space, parameters_of
from flatbench.errors import FlatbenchError, InputError, NotFiniteError

log = logging.getLogger(__name__)

#: (model, batch) -> the batch's mean loss, or (mean loss, number of terms it is the mean of)
Loss = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, int]"]


class LossOperator(PlannedOperator):
    """The curvature matrix of ``L(w) = Σ_b n_b·L_b(w) / Σ_b n_b``, b the batches and n_b their terms.

    Args:
        model: left exactly as it was found; in evaluation mode while the operator is open.
        batches: mappings (BatchEncoding too), tuples, tensors; moved to the model's device. An iterable is
            read once.
        space: see `flatbench.curvature.operators.spaces.Space`.
        only: chooses among the space's parameters by name.
        products: ``exact`` (double backward), ``differences`` (central differences of gradients), or
            ``auto``: exact where second derivatives exist and the memory suffices.
        memory: budget in bytes (or ``2GB``) for graphs, weights' copies and the vectors of a computation;
            half of what is available if None.
        shorten: leave out columns of padding, by ``attention_mask``, where a comparison of losses shows that
            they do not matter.
        precision: ``float32``: a model in half precision is computed in float32 while the operator is open,
            through a copy; ``as_stored``: as it is, and ``relative_error`` says how coarse that is.

    Attributes:
        terms: Σ_b n_b, known once `point` or a product was computed.

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
        memory: int | str | None = None,
        shorten: bool = True,
        precision: Precision = "float32",
    ) -> None:
        self.model, self.space, self._name_filter = model, space, only
        self.batches = cutting.read(batches)
        if not self.batches:
            raise InputError("there are no examples: the batches are empty")
        if any(isinstance(b, Mapping) and b.get("past_key_values") is not None for b in self.batches):
            raise InputError(
                "a batch holds past_key_values: a cache grows with every pass of the model; give whole texts"
            )
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
        self.device = device_of(model, next(iter(parameters.values())))
        budget = memory_.parsed(memory) if isinstance(memory, str) else memory
        self.memory = memory_.default_budget(self.device) if budget is None else budget
        self._parameters: list[nn.Parameter] = []
        self._stack = contextlib.ExitStack()
        self._plan: planning.ProductPlan | None = None
        self._graphs: list[Graph] = []
        self._differences: Differences | None = None
        self._point: tuple[float, Tensor] | None = None
        self._lacks_derivative = False
        self._own_loss = loss is transformers_loss
        self.terms = 0

    # -- what a kind of curvature says --------------------------------------------------------------------

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
                    loss=self._row_loss,
                    batches=self.batches,
                    twice_differentiable=self._products != "differences",
                    curvature=True,
                    precision=self._precision,
                )
            )
            self._parameters = list(parameters.values())
            if [p.shape for p in self._parameters] != list(self.shapes.values()):
                raise InputError("the model's parameters have other shapes than when the operator was made")
            stack.enter_context(torch.enable_grad())
            kinds = half_types(self.model) | self._half_computed()
            self.coarse = why_coarse(kinds)
            self.relative_error = self._coarse_error = UNITS * unit_of_half(kinds)
            stack.enter_context(without_cache(self.model, self._losses_of_samples, self._coarse_error))
            self._find_heads()
            self._versions = cutting.versions(self.batches)
            self._stack = stack.pop_all()

    def _row_loss(self, batch: Any) -> tuple[Tensor, int]:
        """Loss and terms of some rows, outside of the space and inside, where weights may be others."""
        self._find_heads()
        return self._evaluate(cutting.to_device(batch, self.device))

    def _find_heads(self) -> None:
        # the outputs of a Gauss-Newton product are whole
        self._heads = frozenset() if self.gauss_newton else heads(self.model)

    def _close(self) -> None:
        self._plan, self._graphs, self._differences, self._point = None, [], None, None
        self._parameters, self._products, self._chain = [], self._products_request, ()
        self._reserved, self._lacks_derivative = 0, False
        self._stack.close()

    # -- planning -----------------------------------------------------------------------------------------

    @property
    def plan(self) -> planning.ProductPlan:
        """How products are made and what memory they need; made at the first call while open.

        Raises InputError outside of ``with operator:``.
        """
        if self._depth == 0:
            raise InputError("an operator has a plan only while it is open: inside 'with operator:'")
        if self._plan is None:
            self._check_open()
            try:
                self._plan = replace(self._make_plan(), head=self._head_way)
                log.info("%s", self._plan.describe())
                counts = self._plan.graphs or [0] * len(self._plan.kept)
                for piece, kept in zip(self._plan.kept, counts, strict=True):
                    graph = self._graph(piece, kept)
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
            return max(self.plan.peak_bytes, self.plan.several_bytes)

    def reserve(self, needed: int) -> None:
        """Keep no more graphs than leave so many bytes of `memory`; in force until the operator is closed."""
        if needed <= self._reserved:
            return
        self._reserved = needed
        if self._plan is None or self.memory is None:
            return
        if max(self._plan.peak_bytes, self._plan.several_bytes) + needed > self.memory:
            self._plan, self._graphs, self._chain = None, [], ()

    def memory_beside(self, needed: int) -> int:
        """A memory that holds so many bytes beside the operator, once it was told to `reserve` them."""
        least = super().memory_beside(needed)
        with self:
            short = self._products != self._products_request and not self._lacks_derivative
        # with more memory products are exact, and what these take is known to be within their share alone
        return max(least, self._memory_with_rest(needed)) if short else least

    def _graph(self, piece: Any, kept: int = 0) -> Graph | None:
        """The graph of a piece, by the plan's way; block by block with so many blocks' graphs kept."""
        if not self._chain or self._plan is None or self._plan.way != "blocks":
            return self._build(piece)
        return Blockwise.built(
            lambda before: self._build(piece, before),
            self._chain,
            self._parameters,
            gauss_newton=self.gauss_newton,
            kept=kept,
        )

    # -- the loss -----------------------------------------------------------------------------------------

    def _evaluate(self, batch: Any) -> tuple[Tensor, int]:
        """Mean loss and terms of a batch on the device. Raises InputError if the model rejects it."""
        try:
            with losses_in_float32(self.model), self._in_chunks():
                found = self._loss(self.model, batch)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            shown = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise InputError(f"the model rejects a batch: {shown}") from error
        self._without_terms = not isinstance(found, tuple)
        return checked(found, cutting.rows(batch))

    def _finite(self, batch: Any) -> tuple[Tensor, int] | None:
        """Loss and terms of a piece; None without terms. Raises FlatbenchError if it is not finite."""
        loss, terms = self._evaluate(batch)
        if terms == 0:
            return None
        if not bool(torch.isfinite(loss.detach())):
            raise NotFiniteError(f"the loss is {float(loss.detach())}{why_coarse(half_types(self.model))}")
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
                self._check_open()
                # from planning it is known whether the loss tells its terms
                if self.plan and (self._without_terms or not self.gauss_newton):
                    self._check_loss()
                self._point = self._mean_over_terms(self._piece_gradients())
            return self._point

    def _piece_gradients(self) -> Iterator[tuple[float, int, Sequence[Tensor | None]]]:
        """Loss, terms and gradient of each piece that has terms."""
        plan = self.plan
        for graph in self._graphs:
            yield graph.loss, graph.terms, graph.gradients
            if isinstance(graph, Blockwise):
                graph.forget_gradients()
        for piece in plan.rebuilt:
            if plan.way == "blocks":
                built = self._graph(piece)
                found = None if built is None else (built.loss, built.terms, built.gradients)
            else:
                found = self._gradient(piece)
            if found is not None:
                yield found

    def _mean_over_terms(
        self, seen: Iterable[tuple[float, int, Sequence[Tensor | None]]]
    ) -> tuple[float, Tensor]:
        gradient, total, value, used = self._zeros(), 0, 0.0, False
        for loss, terms, parts in seen:
            self._accumulate(gradient, parts, terms)
            total, value = total + terms, value + loss * terms
            used = used or any(part is not None for part in parts)
        self.terms = total
        if total == 0 and self.is_part:  # others have terms
            return 0.0, gradient
        if total == 0:
            raise FlatbenchError("the loss is the mean of no terms")
        if not used:
            cause = why_unused(self.model, functools.partial(self._evaluate, self.batches[0]))
            raise FlatbenchError(f"the loss depends on no parameter of the space{cause}")
        return value / total, gradient.div_(total)

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
        return self._several([vector])[0]

    def _several(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self._check_open()
        if self._differences is None and self.plan.method == "double backward":
            try:
                return self._exact(vectors)
            except RuntimeError as error:
                if self._products != "auto" or not lacks_second_derivative(error):
                    raise
                self._fall_back(str(error))
        return [self._by_differences(vector) for vector in vectors]

    def _together(self) -> int:
        """How many vectors go through the blocks together: more share more, and hold more tangents."""
        return self.plan.together

    def _exact(self, given: Sequence[Tensor]) -> list[Tensor]:
        several = [
            [part.to(p.dtype) for part, p in zip(self.split(vector), self._parameters, strict=True)]
            for vector in given
        ]
        totals, terms = [self._zeros() for _ in given], 0
        self.point()  # says what is wrong with the loss before anything else fails
        for graph in self._graphs:
            self._add_products(totals, graph, several, keep=True)
            terms += graph.terms
        for piece in self.plan.rebuilt:
            built = self._graph(piece)
            if built is not None:
                self._add_products(totals, built, several, keep=len(several) > 1)
                terms += built.terms
            del built  # before the next one is made
        return [total.div_(max(terms, 1)) for total in totals]

    def _add_products(
        self, totals: Sequence[Tensor], graph: Graph, several: Sequence[Sequence[Tensor]], keep: bool
    ) -> None:
        if isinstance(graph, Blockwise):
            found: Iterable[Sequence[Tensor | None]] = graph.products(several, keep)
        else:
            found = (graph.product(vectors, keep) for vectors in several)
        for total, parts in zip(totals, found, strict=True):
            self._accumulate(total, parts, graph.terms)

    def _fall_back(self, message: str) -> None:
        """Use differences from now on, because an operation has no second derivative."""
        self._graphs, self._chain = [], ()
        self._products, self._lacks_derivative = "differences", True
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
