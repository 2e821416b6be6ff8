"""Result of an eigenvalue method: eigenpairs with their own error bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


class ConvergenceWarning(UserWarning):
    """A computation ended before what was asked for was reached; its result says how far it came."""


@dataclass(frozen=True)
class MeanLoss:
    """A loss ``L(w) = Σ_i terms_i · losses_i() / Σ_i terms_i`` as a function of some parameters.

    Attributes:
        parameters: ``w``: leaves with ``requires_grad``, at the point where curvature is wanted.
        losses: one function per batch; computes the batch's mean loss, 0-dimensional and twice
            differentiable in the parameters.
        terms: how many terms each batch's loss is the mean of; positive.
    """

    parameters: Sequence[nn.Parameter]
    losses: Sequence[Callable[[], Tensor]]
    terms: Sequence[int]

    @property
    def dimension(self) -> int:
        """Number of scalars in ``w``, the order of the Hessian."""
        return sum(p.numel() for p in self.parameters)


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs ``(λ_i, v_i)`` of a symmetric ``H``, most wanted first.

    Attributes:
        values: ``λ_i = v_iᵀ H v_i``, the Rayleigh quotients, ``(k,)``.
        residuals: ``‖H v_i − λ_i v_i‖₂``, ``(k,)``. For a symmetric H, some eigenvalue of H lies within
            ``residual_i`` of ``λ_i``.
        errors: estimated error of each value, ``(k,)``: never above the residual, and quadratic in it where
            the gap to the rest of the spectrum is known well enough (see
            `flatbench.curvature.eigenpairs.lanczos`).
        vectors: ``v_i`` of unit length as the columns of ``(n, k)``.
        converged: per pair, whether ``errors_i ≤ tol · |λ_i|`` (PyHessian: ``residuals_i``).
        settled: per pair, whether the method's own stopping rule ended the search, and not its limit of
            products; for PyHessian weaker than ``converged``.
        products: Hessian-vector products over all batches that were spent.
        seconds: wall-clock time.
        verified: whether a search from a fresh random vector, orthogonal to all vectors found, met no larger
            eigenvalue: the guard against a repeated eigenvalue of which only one copy was seen.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    errors: tuple[float, ...]
    vectors: Tensor
    converged: tuple[bool, ...]
    settled: tuple[bool, ...]
    products: int
    seconds: float
    verified: bool = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a long computation; ``found`` holds what had converged by then, perhaps nothing."""

    def __init__(self, found: Eigenpairs) -> None:
        super().__init__("interrupted")
        self.found = found
