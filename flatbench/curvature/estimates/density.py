"""The spectral density by stochastic Lanczos quadrature, with a band for its error.

Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017; Ghorbani, Krishnan,
Xiao, "An investigation into neural net optimization via Hessian eigenvalue density", 2019, arXiv 1901.10159.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.krylov import KrylovBasis
from flatbench.curvature.eigenpairs.rows import Rows
from flatbench.curvature.estimates.probes import student
from flatbench.curvature.operators.base import SymmetricOperator, random_vectors
from flatbench.curvature.operators.memory import readable, sufficient
from flatbench.errors import InputError

#: on the band, because a probe's weights are skewed
_SKEWNESS = 1.1


@dataclass(frozen=True)
class Density:
    """The density of eigenvalues, smoothed by a Gaussian: ``φ(t) = 1/n Σ_i N(t; λ_i, width²)``.

    Attributes:
        points: t, ``(points,)``, increasing.
        values: the estimate of φ at them.
        lower, upper: its band; at each point it holds φ in about 95 % of all cases.
        width: standard deviation of the Gaussian.
        outliers: eigenvalues that were found exactly on the way, and count exactly.
        products: products with a vector that were spent.
        seconds: wall-clock time.
    """

    points: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor
    width: float
    outliers: tuple[float, ...]
    products: int
    seconds: float


class _Outside(SymmetricOperator):
    """An operator on the space orthogonal to some of its eigenvectors."""

    def __init__(self, inner: SymmetricOperator, vectors: Tensor) -> None:
        self.inner, self.vectors = inner, vectors
        self.dimension, self.dtype, self.device = inner.dimension, inner.dtype, inner.device
        self.relative_error = inner.relative_error

    def _product(self, vector: Tensor) -> Tensor:
        return self.project(self.inner @ self.project(vector))  # symmetric for every vector

    def project(self, vector: Tensor) -> Tensor:
        return vector - self.vectors @ (self.vectors.T @ vector)


def spectral_density(
    operator: SymmetricOperator,
    *,
    probes: int = 10,
    steps: int = 40,
    points: int = 201,
    width: float | None = None,
    seed: int = 0,
) -> Density:
    """The smoothed density from ``probes`` Lanczos runs of ``steps`` steps.

    A first run finds the outlying eigenvalues; those that have converged are counted exactly, and the probes
    are drawn orthogonal to their vectors, which takes them out of the variance.

    Args:
        probes: random starting vectors; at least 3.
        steps: of each run. The quadrature resolves widths down to about 1.5·range/steps.
        points: of the grid, which reaches three widths beyond the spectrum.
        width: of the Gaussian; ``1.5·range/steps`` if None.
        seed: of the probes.

    Raises InputError for fewer probes or steps than make sense, a width that is not positive, or too little
    memory.
    """
    begun, before, n = time.perf_counter(), operator.products, operator.dimension
    steps = min(steps, n)
    if probes < 3 or steps < 1 or points < 2 or (width is not None and not width > 0):
        raise InputError("spectral_density: needs probes ≥ 3, steps ≥ 1, points ≥ 2 and a positive width")
    with operator:
        _check_memory(operator, steps)
        basis = _run(operator, random_vectors(operator, 1, seed)[:, 0], steps, seed)
        ritz = basis.ritz("LM")
        low, high = min(ritz.values), max(ritz.values)
        width = width or 1.5 * max(high - low, abs(high) * 1e-3, 1e-30) / steps
        sharp = [i for i, residual in enumerate(ritz.residuals) if residual <= 1e-3 * width]
        outside = _Outside(operator, basis.vectors(ritz, sharp))
        grid = torch.linspace(low - 3 * width, high + 3 * width, points, dtype=torch.float64)
        exact = _smooth(grid, torch.tensor([ritz.values[i] for i in sharp]), None, width) / n
        del basis
        samples = []
        rest = n - len(sharp)
        for i in range(probes if rest else 0):
            start = outside.project(random_vectors(operator, 1, seed + 1 + i)[:, 0])
            found = _run(outside, start, min(steps, rest), seed).ritz("LM")
            weights = found.coefficients[0].square()
            nodes = torch.tensor(found.values, dtype=torch.float64)
            samples.append(_smooth(grid, nodes, weights, width) * rest / n)
    drawn = torch.stack(samples) if samples else torch.zeros(2, points, dtype=torch.float64)
    values = exact + drawn.mean(dim=0)
    band = _SKEWNESS * student(len(drawn)) * drawn.std(dim=0) / math.sqrt(len(drawn))
    return Density(
        points=grid,
        values=values,
        lower=(values - band).clamp_min(0),
        upper=values + band,
        width=width,
        outliers=tuple(ritz.values[i] for i in sharp),
        products=operator.products - before,
        seconds=time.perf_counter() - begun,
    )


def _run(operator: SymmetricOperator, start: Tensor, steps: int, seed: int) -> KrylovBasis:
    rows = Rows(operator.dimension, operator.dtype, operator.device)
    basis = KrylovBasis(operator, steps + 1, 1, seed, rows)
    basis.begin_at(start)
    while basis.length < steps and not basis.invariant:
        basis.grow()
    return basis


def _smooth(grid: Tensor, nodes: Tensor, weights: Tensor | None, width: float) -> Tensor:
    if not len(nodes):
        return torch.zeros_like(grid)
    bells = torch.exp(-((grid[:, None] - nodes.double()[None]) ** 2) / (2 * width**2))
    bells = bells / (width * math.sqrt(2 * math.pi))
    return bells.sum(dim=1) if weights is None else bells @ weights


def _check_memory(operator: SymmetricOperator, steps: int) -> None:
    vectors = 2 * (steps + 3) * operator.dimension * operator.dtype.itemsize
    operator.reserve(vectors)
    if operator.memory is not None and operator.reserved_memory() + vectors > operator.memory:
        raise InputError(
            f"memory: {readable(operator.memory)} do not hold {steps} steps of Lanczos; about "
            f"{sufficient(operator.memory_beside(vectors))} would, or fewer steps"
        )
