"""Upper bounds for eigenvalues that hold with a stated probability over the random start of a Krylov space.

Let u be a unit eigenvector of H for its largest eigenvalue λ, and X the random orthonormal block that a
Krylov space starts from. With ``H V = V T + W C`` (V orthonormal, W the next block),
``y = Vᵀu`` and ``w = Wᵀu``::

    y = (λ − T)⁻¹ Cᵀ w,    Xᵀu = (the start's rows of y),    ‖y‖² + ‖w‖² ≤ 1,

so that u's part in the start is at most

    σ(λ) = max over w of  ‖X-rows of (λ − T)⁻¹ Cᵀ w‖ / √(‖w‖² + ‖(λ − T)⁻¹ Cᵀ w‖²),

which falls with λ above T's largest eigenvalue, and faster with every step. A random direction has a smaller
part than δ in the start with a probability ε that is known (`least_component`). Hence, with probability 1 − ε
and for all steps at once, λ is at most the value at which ``σ = δ``. For one vector, ``σ(λ)⁻² = Σ_j p_j(λ)²``
with the Lanczos polynomials p_j, and the bound is a little below that of van Dorsselaer, Hochstenbach and van
der Vorst (SIAM J. Matrix Anal. Appl. 22, 2000), ``|p_m(λ)| = 1/δ``; Kuczyński and Woźniakowski (1992) give it
before the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

#: points at which σ is looked at together, and how often the interval between two of them is looked at again
_POINTS, _ROUNDS = 48, 3
#: standard deviations of what rounding adds to a component
_NOISE_FACTOR = 3.0


def least_component(dimension: int, width: int, probability: float) -> float:
    """δ: a fixed unit vector's part in a random ``width``-dimensional subspace is smaller with at most ε.

    The squared part has a Beta distribution of ``width/2`` and ``(dimension − width)/2``, whose distribution
    function is at most that of the power of x alone.

    Args:
        dimension: of the whole space.
        width: of the subspace.
        probability: ε.

    Returns:
        δ ≥ 0; 0 where the complement is too small for such a bound, and 1 if there is none.
    """
    a, b = width / 2, (dimension - width) / 2
    if b <= 0:
        return 1.0
    if b < 1:
        return math.sin(math.pi * probability / 2) if (width, dimension) == (1, 2) else 0.0
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp((math.log(probability * a) + log_beta) / width)


@dataclass(frozen=True)
class Cycle:
    """A Krylov space as it was when it was restarted, or is now, in the basis of its Ritz vectors.

    Attributes:
        values: ``θ``, ``(m,)``.
        start: rows of what it began from, ``(p, m)``: X, or the block that the space before it ended with.
        coupling: ``Cᵀ``, ``(m, p')``.
    """

    values: Tensor
    start: Tensor
    coupling: Tensor


@dataclass
class Phase:
    """What a Krylov space that began at random, orthogonal to some locked vectors, knows of its start.

    Attributes:
        locked: how many vectors stand before it in the basis.
        matrix: T of the locked vectors, ``(locked, locked)``.
        residuals: rows R with ``‖R s‖`` the residual of the locked combination s, ``(q, locked)``.
        least: δ; None if it did not begin at random, or its bound was refuted.
        start: where the start block, or what took its place in a restart, stands in the space.
        cycles: the space before each of its restarts.
    """

    locked: int
    matrix: Tensor
    residuals: Tensor
    least: float | None
    start: range
    cycles: list[Cycle] = field(default_factory=list)


def largest_visible(cycles: Sequence[Cycle], least: float, noise: float) -> float:
    """The value above which no eigenvalue lies whose eigenspace has a part of ``least`` in the start.

    Args:
        cycles: of one space, in order; the last is as it stands.
        least: δ.
        noise: what rounding does to a component of a product, for the directions are many and it is spread.

    Returns:
        The bound; infinite where rounding hides the start.
    """
    top = float(cycles[-1].values.max())
    if least <= 0:
        return math.inf
    scale = max(float(cycle.values.abs().max()) for cycle in cycles)
    scale = max(scale, *(float(cycle.coupling.norm()) for cycle in cycles))
    if scale == 0:
        return top
    # distances from the top Ritz value
    low, high = 1e-16 * scale, 1e3 * max(scale, noise / least)
    for _ in range(_ROUNDS):
        distances = torch.logspace(math.log10(low), math.log10(high), _POINTS, dtype=torch.float64)
        possible = (_largest_part(top, distances, cycles, noise) >= least).nonzero()
        if not len(possible):
            return top + float(distances[0])
        last = int(possible[-1])
        if last == _POINTS - 1:
            return math.inf
        low, high = float(distances[last]), float(distances[last + 1])
    return top + high


def _largest_part(top: float, distances: Tensor, cycles: Sequence[Cycle], noise: float) -> Tensor:
    """σ at distances from the top Ritz value, and what rounding may add to it."""
    blurred = torch.zeros_like(distances)
    transfer: Tensor | None = None
    for cycle in cycles:
        inverse = 1 / (distances[:, None] + (top - cycle.values).clamp_min(0)[None])
        through = cycle.start * inverse[:, None]
        before = torch.ones_like(distances) if transfer is None else _norms(transfer)
        blurred += before * noise * math.sqrt(len(cycle.values)) * _norms(through)
        step = through @ cycle.coupling
        transfer = step if transfer is None else transfer @ step
    assert transfer is not None
    spread = inverse[:, :, None] * cycle.coupling
    if cycle.coupling.shape[1] == 1:  # the factor of a column is its norm
        part = transfer / (1 + spread.square().sum(dim=1, keepdim=True)).sqrt()
    else:
        unit = torch.eye(cycle.coupling.shape[1], dtype=torch.float64).expand(len(distances), -1, -1)
        root = torch.linalg.qr(torch.cat([unit, spread], dim=1), mode="r").R
        part = torch.linalg.solve_triangular(root, transfer, upper=True, left=False)
    return _norms(part) + _NOISE_FACTOR * blurred


def _norms(matrices: Tensor) -> Tensor:
    """Largest singular value of each matrix of ``(g, a, b)``."""
    single = min(matrices.shape[1:]) == 1
    norms: Tensor = (
        torch.linalg.vector_norm(matrices, dim=(1, 2)) if single else torch.linalg.matrix_norm(matrices, 2)
    )
    return norms


def largest_beside(matrix: Tensor, residuals: Tensor, rest: float, count: int) -> list[float]:
    """Upper bounds of the largest eigenvalues of H, from its part on a subspace and a bound elsewhere.

    In a basis that begins with the subspace, ``H = [[T, Rᵀ], [R, S]]`` with ``S ≤ rest``: so H's eigenvalues,
    in order, are at most those of ``[[T, Rᵀ], [R, rest·I]]`` (Weyl's monotonicity).

    Args:
        matrix: T, ``(m, m)``.
        residuals: R, ``(q, m)``, in any orthonormal basis of its range.
        rest: upper bound of S.
        count: how many.
    """
    if not math.isfinite(rest) or not len(matrix):
        return [rest] * count
    m, q = len(matrix), len(residuals)
    whole = rest * torch.eye(m + q, dtype=torch.float64)
    whole[:m, :m] = matrix
    whole[m:, :m], whole[:m, m:] = residuals, residuals.T
    values = torch.linalg.eigvalsh(whole).tolist()
    return sorted([*values, *[rest] * count], reverse=True)[:count]
