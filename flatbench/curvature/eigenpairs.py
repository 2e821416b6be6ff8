"""What an eigenvalue engine is given and what it gives back, so that engines can be exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


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
    """Approximate eigenpairs ``(λ_i, v_i)`` of a symmetric ``H``, largest ``|λ_i|`` first.

    Attributes:
        values: ``λ_i = v_iᵀ H v_i``, the Rayleigh quotients, ``(k,)``.
        residuals: ``‖H v_i − λ_i v_i‖₂``, ``(k,)``. For a symmetric H, some eigenvalue of H lies within
            ``residual_i`` of ``λ_i``; that it is the largest one is not proved by this.
        vectors: ``v_i`` of unit length, each as tensors of the parameters' shapes.
        converged: per pair, whether ``residual_i ≤ tol · |λ_i|``: the error bound meets the tolerance.
        settled: per pair, whether the engine's own stopping rule ended the search, and not its limit of
            iterations; weaker than ``converged``.
        products: Hessian-vector products over all batches that were spent, those for residuals included.
        seconds: wall-clock time.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    vectors: tuple[tuple[Tensor, ...], ...]
    converged: tuple[bool, ...]
    settled: tuple[bool, ...]
    products: int
    seconds: float


class EigenEngine(Protocol):
    """Computes the eigenpairs of a loss's Hessian that are largest in magnitude."""

    @property
    def name(self) -> str:
        """Package and version, for the record."""

    def top(self, loss: MeanLoss, *, k: int, tol: float, max_iterations: int, seed: int) -> Eigenpairs:
        """The ``k`` pairs with the largest ``|λ|``.

        Args:
            tol: relative tolerance of an eigenvalue.
            max_iterations: limit of Hessian-vector products per pair.
            seed: decides the start vectors; the global random state is left as it was.
        """
