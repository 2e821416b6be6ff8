"""The diagonal of an operator by sampling, with a standard error of every entry.

Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007; with the dominant part taken out
exactly as in Hutch++ (Baston and Nakatsukasa, "Stochastic diagonal estimation", 2022, arXiv 2201.10684).
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.result import ConvergenceWarning
from flatbench.curvature.estimates.probes import probes, sketched, student
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.errors import InputError
from flatbench.sums import norm


@dataclass(frozen=True)
class Diagonal:
    """``diag H``.

    Attributes:
        values: ``(n,)``.
        standard_errors: ``(n,)``, of each entry.
        relative_error: root mean square of the standard errors relative to that of the values.
        converged: whether that and the products' error are within the tolerance.
        products: products with a vector that were spent.
        seconds: wall-clock time.
        product_error: the products' own relative error (of central differences, of half precision).
    """

    values: Tensor
    standard_errors: Tensor
    relative_error: float
    converged: bool
    products: int
    seconds: float
    product_error: float = 0.0


def diagonal(
    operator: SymmetricOperator,
    *,
    tol: float = 0.05,
    rank: int = 10,
    max_products: int = 300,
    seed: int = 0,
) -> Diagonal:
    """``diag H = diag(Q (HQ)ᵀ) + E[g ⊙ (I − QQᵀ) H g]`` over vectors g of random signs.

    Args:
        tol: the root mean square of the standard errors wanted, relative to that of the diagonal.
        rank: columns of Q; costs twice as many products.
        max_products: limit.
        seed: of the probes.

    Warns ConvergenceWarning if the limit was met first, or where products are too coarse for the tolerance.
    Raises InputError if the limit is too small to begin.
    """
    begun, before, n = time.perf_counter(), operator.products, operator.dimension
    fewest = 8
    if max_products < 2 * min(rank, n) + fewest:
        raise InputError(f"max_products: {max_products} are fewer than rank {rank} and {fewest} samples take")
    with operator:
        sketch = sketched(operator, rank, seed)
        exact = (sketch.basis * sketch.product).sum(dim=1)
        mean, spread = torch.zeros_like(exact), torch.zeros_like(exact)
        errors = torch.full_like(exact, math.inf)
        relative = math.inf
        for count, probe in enumerate(probes(operator, seed + 1), start=1):
            sample = probe * sketch.project_out(operator @ probe)
            change = sample - mean
            mean += change / count
            spread += change * (sample - mean)  # Welford's sum of squares
            if count >= fewest:
                errors = (spread / (count * (count - 1))).sqrt() * (student(count) / 2)
                size = float(norm(exact + mean))
                relative = float(norm(errors)) / size if size else 0.0
                if relative <= tol or operator.products - before >= max_products:
                    break
    if relative > tol:
        warnings.warn(
            f"relative error {relative:.2g} of the diagonal after {max_products} products; allow more",
            ConvergenceWarning,
            stacklevel=2,
        )
    rough = operator.relative_error
    if rough > tol:
        warnings.warn(
            f"the products are exact to {rough:.1g} only, more than the tolerance {tol:.2g}; choose products "
            "'exact' where the memory allows them, or precision 'float32'",
            ConvergenceWarning,
            stacklevel=2,
        )
    seconds = time.perf_counter() - begun
    converged = relative <= tol and rough <= tol
    spent = operator.products - before
    return Diagonal(exact + mean, errors, relative, converged, spent, seconds, rough)
