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
        residuals: ``‖H v_i − λ_i v_i‖₂`` and what rounding adds to it, ``(k,)``. For a symmetric H, some
            eigenvalue of H lies within ``residual_i`` of ``λ_i``.
        errors: distance of each value from its eigenvalue, ``(k,)``: the i-th most wanted eigenvalue lies
            within, with probability 99 %; without an upper bound, the residual: *some* eigenvalue does.
        upper_bounds: how far the i-th wanted eigenvalue can lie from 0 in the wanted direction, with
            probability 99 % for all together, ``(k,)``: at most for ``LA``, at least for ``SA``, ``|λ_i|`` at
            most for ``LM``; infinite where nothing is known.
        vectors: ``v_i`` of unit length as the columns of ``(n, k)``.
        converged: per pair, whether an eigenvalue is known to lie within ``tol · |λ_i|``, by the residual or
            by a gap that is proved (or within what rounding allows, if that leaves a correct digit).
        certified: per pair, whether the i-th wanted eigenvalue is known to: `values` and `upper_bounds` lie
            within ``tol · |λ_i|``.
        settled: per pair, whether the method's own stopping rule ended the search, and not its limit of
            products; for PyHessian weaker than ``converged``.
        products: Hessian-vector products over all batches that were spent.
        seconds: wall-clock time.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    errors: tuple[float, ...]
    upper_bounds: tuple[float, ...]
    vectors: Tensor
    converged: tuple[bool, ...]
    certified: tuple[bool, ...]
    settled: tuple[bool, ...]
    products: int
    seconds: float


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a long computation; ``found`` holds what had converged by then, perhaps nothing."""

    def __init__(self, found: Eigenpairs) -> None:
        super().__init__("interrupted")
        self.found = found
