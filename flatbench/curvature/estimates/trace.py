"""Trace and Frobenius norm by sampling, each with a standard error and a rule when to stop.

Meyer, Musco, Musco, Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", 2021, arXiv 2010.09649.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.result import ConvergenceWarning
from flatbench.curvature.estimates.probes import Sketch, probes, sketched, standard_error
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.errors import InputError
from flatbench.sums import dot

#: fewer samples do not tell their own spread
_MIN_SAMPLES = 20


@dataclass(frozen=True)
class Estimate:
    """A number found by sampling.

    Attributes:
        value: the estimate.
        standard_error: ±2 of it, beside `product_error`, hold the true value in about 95 % of all cases; 0
            where the whole matrix was taken.
        converged: whether the standard error and the products' error are within the tolerance.
        products: products with a vector that were spent.
        samples: independent samples that the standard error rests on; 0 where the whole matrix was taken.
        seconds: wall-clock time.
        product_error: about what the products' own error may make of it, by the operator's ``relative_error``
            (of central differences, of half precision), unless errors of all products point one way, when it
            is more; 0 where products are exact up to rounding.
    """

    value: float
    standard_error: float
    converged: bool
    products: int
    samples: int
    seconds: float
    product_error: float = 0.0


def trace(
    operator: SymmetricOperator,
    *,
    tol: float = 0.02,
    rank: int = 10,
    max_products: int = 300,
    seed: int = 0,
) -> Estimate:
    """``tr H = tr QᵀHQ + E[gᵀ(I − QQᵀ) H (I − QQᵀ)g]``: the dominant part exactly, the rest by sampling.

    Args:
        tol: the standard error wanted, relative to the value.
        rank: columns of Q; costs twice as many products. 0 is Hutchinson's estimator.
        max_products: limit.
        seed: of the probes; the global random state is not touched.

    Warns ConvergenceWarning if the limit was met first, or where products are too coarse for the tolerance.
    Raises InputError if the limit does not even allow 20 samples.
    """
    return _sample(
        operator,
        lambda sketch: float((sketch.basis * sketch.product).sum()),
        dot,
        lambda value, norm: abs(value) + norm,
        tol,
        rank,
        max_products,
        seed,
    )


def frobenius_norm(
    operator: SymmetricOperator,
    *,
    tol: float = 0.02,
    rank: int = 10,
    max_products: int = 300,
    seed: int = 0,
) -> Estimate:
    """``‖H‖_F``, from ``‖H‖_F² = ‖HQ‖_F² + E‖H(I − QQᵀ)g‖²``. See `trace` for the arguments."""
    squared = _sample(
        operator,
        lambda sketch: _square(sketch.product),
        lambda probe, product: _square(product),
        lambda value, norm: 2 * value,
        2 * tol,  # the square's relative error is twice that of the norm
        rank,
        max_products,
        seed,
    )
    value = math.sqrt(max(squared.value, 0.0))
    half = 1 / (2 * value) if value else 0.0
    return replace(
        squared,
        value=value,
        standard_error=squared.standard_error * half,
        product_error=squared.product_error * half,
    )


def _square(tensor: Tensor) -> float:
    """``‖tensor‖_F²``, without a copy in float64 as large as the tensor: it may be n × rank numbers."""
    return math.fsum(dot(column, column) for column in (tensor.T if tensor.ndim > 1 else [tensor]))


def _sample(
    operator: SymmetricOperator,
    dominant: Callable[[Sketch], float],
    form: Callable[[Tensor, Tensor], float],
    scale: Callable[[float, float], float],
    tol: float,
    rank: int,
    max_products: int,
    seed: int,
) -> Estimate:
    """See `trace`.

    Args:
        dominant: the part on the sketch's basis.
        form: a sample of the rest, of a probe and its product.
        scale: what a relative error of all products is to be multiplied with, of the value and ``‖H‖_F``.
    """
    begun, before, n = time.perf_counter(), operator.products, operator.dimension
    if not rank >= 0 or not tol > 0:
        raise InputError(f"rank: {rank} and tol: {tol} must not be negative, and tol not zero")
    rank = min(rank, n)
    samples: list[float] = []
    if max_products < min(2 * rank + _MIN_SAMPLES, 2 * n):
        raise InputError(f"max_products: {max_products} are fewer than rank {rank} and 20 samples take")
    with operator:
        if n <= rank + _MIN_SAMPLES // 2:  # the whole matrix costs no more
            identity = torch.eye(n, dtype=operator.dtype, device=operator.device)
            whole = operator @ identity
            value, norm = dominant(Sketch(identity, whole)), math.sqrt(_square(whole))
            return _told(operator, value, 0.0, samples, scale(value, norm), tol, before, begun)
        sketch = sketched(operator, rank, seed) if rank else None
        exact = dominant(sketch) if sketch else 0.0
        basis_part = _square(sketch.product) if sketch else 0.0
        squares: list[float] = []
        error = math.inf
        for probe in probes(operator, seed + 1):
            outside = sketch.project_out(probe) if sketch else probe
            product = operator @ outside
            samples.append(form(outside, product))
            squares.append(_square(product))
            if len(samples) >= _MIN_SAMPLES:
                value, error = exact + math.fsum(samples) / len(samples), standard_error(samples)
                if error <= tol * abs(value) or operator.products - before >= max_products:
                    break
        norm = math.sqrt(basis_part + math.fsum(squares) / len(squares))
        return _told(operator, value, error, samples, scale(value, norm), tol, before, begun)


def _told(
    operator: SymmetricOperator,
    value: float,
    error: float,
    samples: Sequence[float],
    scale: float,
    tol: float,
    before: int,
    begun: float,
) -> Estimate:
    """The estimate, with a warning of what is not within the tolerance."""
    spent = operator.products - before
    product_error = operator.relative_error * scale
    sampled, exact = error <= tol * abs(value), product_error <= tol * abs(value)
    if not sampled:
        warnings.warn(
            f"standard error {error:.2g} of {value:.4g} after {spent} products; allow more",
            ConvergenceWarning,
            stacklevel=4,
        )
    if not exact:
        warnings.warn(
            f"the products' own error may make {product_error:.2g} of {value:.4g}: they are exact to "
            f"{operator.relative_error:.1g} only; choose products 'exact' where the memory allows them, or "
            "precision 'float32'",
            ConvergenceWarning,
            stacklevel=4,
        )
    seconds = time.perf_counter() - begun
    return Estimate(value, error, sampled and exact, spent, len(samples), seconds, product_error)
