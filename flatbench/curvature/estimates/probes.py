"""Random probes, the sketch that takes the largest part out of their variance, and their standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.memory import readable, sufficient
from flatbench.errors import InputError
from flatbench.sums import length

#: on standard errors, because quadratic forms of probes are skewed
_SKEWNESS = 1.15


@dataclass(frozen=True)
class Sketch:
    """An orthonormal ``Q (n, r)`` near the dominant eigenvectors, and ``H Q``."""

    basis: Tensor
    product: Tensor

    def project_out(self, vector: Tensor) -> Tensor:
        """``(I − Q Qᵀ) v``."""
        return vector - self.basis @ (self.basis.T @ vector)


def sketched(operator: SymmetricOperator, rank: int, seed: int) -> Sketch:
    """Q spans ``H S`` for r random sign vectors S; costs 2r products.

    Raises InputError if the memory does not hold the 2r vectors.
    """
    rank = min(rank, operator.dimension)
    vectors = (2 * rank + 4) * operator.dimension * operator.dtype.itemsize
    operator.reserve(vectors)
    if operator.memory is not None and operator.reserved_memory() + vectors > operator.memory:
        raise InputError(
            f"memory: {readable(operator.memory)} do not hold a sketch of rank {rank}; about "
            f"{sufficient(operator.memory_beside(vectors))} would, or a smaller rank"
        )
    signs = probes(operator, seed)
    image = torch.stack([operator @ next(signs) for _ in range(rank)], dim=1)
    basis, _ = torch.linalg.qr(image)
    for column in basis.T:
        column.div_(length(column) or 1.0)  # which QR leaves another than 1 in single precision
    return Sketch(basis, operator @ basis)


def probes(operator: SymmetricOperator, seed: int) -> Iterator[Tensor]:
    """Vectors of random signs ``(n,)``, from a stream of their own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(0, 2, (operator.dimension,), generator=generator, dtype=torch.int8)
        yield drawn.to(operator.device, operator.dtype).mul_(2).sub_(1)


def student(count: int) -> float:
    """The 97.5 % quantile of Student's t with ``count − 1`` degrees of freedom (Cornish and Fisher)."""
    free = count - 1
    return 1.96 + 2.372 / free + 2.822 / free**2 + 2.56 / free**3


def standard_error(samples: Sequence[float]) -> float:
    """Of the mean of independent samples, widened so that ±2 of them hold the mean in 95 % of all cases."""
    count = len(samples)
    mean = math.fsum(samples) / count
    variance = math.fsum((x - mean) ** 2 for x in samples) / (count - 1)
    return _SKEWNESS * student(count) / 2 * math.sqrt(variance / count)
