"""Trace and Frobenius norm by sampling, each with a standard error and a rule when to stop.

Meyer, Musco, Musco, Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", 2021, arXiv 2010.09649.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

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
        standard_error: ±2 of it hold the true value in about 95 % of all cases; 0 for an exact value.
        converged: whether the standard error is within the tolerance.
        products: products with a vector that were spent.
        samples: independent samples that the standard error rests on; 0 for an exact value.
        seconds: wall-clock time.
    """

    value: float
    standard_error: float
    converged: bool
    products: int
    samples: int
    seconds: float


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

    Warns ConvergenceWarning if the limit was met first. Raises InputError if it does not even allow
    20 samples.
    """
    return _sample(
        operator,
        lambda sketch: float((sketch.basis * sketch.product).sum()),
        dot,
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
        lambda sketch: float(sketch.product.double().square().sum()),
        lambda probe, product: float(product.double().square().sum()),
        2 * tol,  # the square's relative error is twice that of the norm
        rank,
        max_products,
        seed,
    )
    value = math.sqrt(max(squared.value, 0.0))
    error = squared.standard_error / (2 * value) if value else 0.0
    return Estimate(value, error, squared.converged, squared.products, squared.samples, squared.seconds)


def _sample(
    operator: SymmetricOperator,
    dominant: Callable[[Sketch], float],
    form: Callable[[Tensor, Tensor], float],
    tol: float,
    rank: int,
    max_products: int,
    seed: int,
) -> Estimate:
    begun, before, n = time.perf_counter(), operator.products, operator.dimension
    if not rank >= 0 or not tol > 0:
        raise InputError(f"rank: {rank} and tol: {tol} must not be negative, and tol not zero")
    rank = min(rank, n)
    if max_products < min(2 * rank + _MIN_SAMPLES, 2 * n):
        raise InputError(f"max_products: {max_products} are fewer than rank {rank} and 20 samples take")
    with operator:
        if n <= rank + _MIN_SAMPLES // 2:  # the whole matrix costs no more
            identity = torch.eye(n, dtype=operator.dtype, device=operator.device)
            value = dominant(Sketch(identity, operator @ identity))
            return Estimate(value, 0.0, True, operator.products - before, 0, time.perf_counter() - begun)
        sketch = sketched(operator, rank, seed) if rank else None
        exact = dominant(sketch) if sketch else 0.0
        samples: list[float] = []
        error = math.inf
        for probe in probes(operator, seed + 1):
            outside = sketch.project_out(probe) if sketch else probe
            samples.append(form(outside, operator @ outside))
            if len(samples) >= _MIN_SAMPLES:
                value, error = exact + math.fsum(samples) / len(samples), standard_error(samples)
                if error <= tol * abs(value) or operator.products - before >= max_products:
                    break
    converged = error <= tol * abs(value)
    if not converged:
        warnings.warn(
            f"standard error {error:.2g} of {value:.4g} after {max_products} products; allow more",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Estimate(
        value, error, converged, operator.products - before, len(samples), time.perf_counter() - begun
    )
