"""Symmetric linear operators: a matrix known only by its products with vectors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from flatbench.errors import FlatbenchError, InputError
from flatbench.sums import dot, length


class SymmetricOperator(ABC):
    """A symmetric ``(n, n)`` matrix H given by its products ``H @ v``.

    It is a context manager, and may be entered again inside itself: what is expensive to prepare (a graph, a
    merged model) is prepared at the outermost entry and given back at its end. A product outside of any
    ``with`` prepares and gives back for itself.

    Attributes:
        dimension: n.
        dtype: of the vectors that products take and give; float32 or float64.
        device: of the same.
        products: how many products with a vector were made so far.
        memory: bytes that the operator and a computation with it may use together, None for no limit.
        relative_error: estimated relative error of a product beyond rounding (finite differences have one).
        coarse: what a message says of half precision, where products are computed in it; empty else.
    """

    dimension: int
    dtype: torch.dtype
    device: torch.device
    products: int = 0
    memory: int | None = None
    relative_error: float = 0.0
    coarse: str = ""
    _depth: int = 0

    @abstractmethod
    def _product(self, vector: Tensor) -> Tensor:
        """``H @ vector`` for a vector ``(n,)``; called while the operator is open."""

    def _open(self) -> None:  # noqa: B027 - most operators need no preparation
        """Prepare; called at the outermost entry."""

    def _close(self) -> None:  # noqa: B027
        """Give back what `_open` took; called at the outermost exit, after an exception as well."""

    def reserved_memory(self) -> int:
        """Bytes that the operator itself holds while it is open and makes products."""
        return 0

    def reserve(self, needed: int) -> None:  # noqa: B027 - most operators have nothing to give up
        """Leave so many bytes of `memory` to a computation, as far as possible, until it is closed."""

    def memory_beside(self, needed: int) -> int:
        """A memory that holds so many bytes beside the operator, once it was told to `reserve` them."""
        return self.reserved_memory() + needed

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector ``(n,)`` in the shapes of what the operator acts on."""
        return (vector,)

    def __enter__(self) -> Self:
        if self._depth == 0:
            self._open()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._close()

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Product with a vector ``(n,)`` or, column by column, with ``(n, m)``.

        Raises FlatbenchError if a product is not finite.
        """
        if vectors.ndim not in (1, 2) or len(vectors) != self.dimension:
            raise InputError(
                f"a product needs vectors of length {self.dimension}, not of shape {tuple(vectors.shape)}"
            )
        with self:
            if vectors.ndim == 1:
                return self._finite_products([vectors])[0]
            columns, most = list(vectors.T), self._together()
            groups = [columns[start : start + most] for start in range(0, len(columns), most)]
            return torch.stack([each for group in groups for each in self._finite_products(group)], dim=1)

    @property
    def is_open(self) -> bool:
        """Whether it is inside of ``with operator:``."""
        return self._depth > 0

    def _together(self) -> int:
        """How many vectors `_several` is given at a time; called while the operator is open."""
        return 1

    def _several(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """``H @ vector`` for each of a few vectors ``(n,)``."""
        return [self._product(vector) for vector in vectors]

    def _finite_products(self, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        self.products += len(vectors)
        products = self._several(vectors)
        for product in products:
            if not bool(torch.isfinite(product.sum())) and not bool(torch.isfinite(product).all()):
                raise FlatbenchError(f"a Hessian-vector product is not finite{self.coarse}")
        return products


class MatrixOperator(SymmetricOperator):
    """A dense matrix, or any function that multiplies with one, as an operator.

    Args:
        matrix: ``(n, n)`` tensor, or a function from ``(n,)`` to ``(n,)``.
        dimension, dtype, device: of a function's vectors; a matrix says its own.
    """

    def __init__(
        self,
        matrix: Tensor | Callable[[Tensor], Tensor],
        dimension: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        if isinstance(matrix, Tensor):
            if matrix.ndim != 2 or len(matrix) != matrix.shape[1]:
                raise InputError(f"an operator's matrix must be square, not {tuple(matrix.shape)}")
            self.dimension, self.dtype, self.device = len(matrix), matrix.dtype, matrix.device
            self._multiply: Callable[[Tensor], Tensor] = matrix.matmul
        else:
            if dimension is None:
                raise InputError("an operator made of a function needs its dimension")
            self.dimension, self.dtype, self.device = dimension, dtype, torch.device(device)
            self._multiply = matrix

    def _product(self, vector: Tensor) -> Tensor:
        return self._multiply(vector)


def random_vectors(operator: SymmetricOperator, count: int, seed: int) -> Tensor:
    """Standard normal ``(n, count)``, drawn on the CPU from a stream of its own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, operator.dimension, generator=generator, dtype=operator.dtype)
    return drawn.T.to(operator.device)


def check_symmetric(operator: SymmetricOperator, seed: int = 0, tolerance: float | None = None) -> float:
    """Probe ``xᵀHy = yᵀHx`` with two random vectors, at the price of two products.

    Args:
        tolerance: relative to ``‖Hx‖·‖y‖``; a little above rounding and the operator's own error if None.

    Returns:
        The relative difference. Raises InputError if it exceeds the tolerance.
    """
    pair = random_vectors(operator, 2, seed)
    x, y = pair[:, 0], pair[:, 1]
    with operator:
        hx, hy = operator @ x, operator @ y
    scale = max(length(hx) * length(y), length(hy) * length(x), torch.finfo(operator.dtype).tiny)
    difference = abs(dot(y, hx) - dot(x, hy)) / scale
    allowed = symmetry_tolerance(operator) if tolerance is None else tolerance
    if difference > allowed:
        raise InputError(
            f"the operator is not symmetric: xᵀHy and yᵀHx differ by {difference:.1e} of ‖Hx‖·‖y‖"
            f"{operator.coarse}"
        )
    return difference


def symmetry_tolerance(operator: SymmetricOperator) -> float:
    """What rounding and the operator's own error may make of symmetry, relative to the operator's norm."""
    return float(torch.finfo(operator.dtype).eps ** 0.5) + 10 * operator.relative_error
