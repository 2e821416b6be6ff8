"""The full-space gradient of adapted weights from LoRA's own gradients, without forming an n x m matrix.

For ``W = W0 + s·B·A`` with B ``(n, r)`` and A ``(r, m)``, let ``T_A`` and ``T_B`` be the r x r matrices that
whiten the factors: ``Q_A = Aᵀ·T_A`` and ``Q_B = B·T_B`` have orthonormal columns, ``(A·Aᵀ)⁺ = T_A·T_Aᵀ``. The
two estimates of arXiv 2508.00522 (Eq. 10-12) are projections of the true gradient G:

    G1 = (1/s)·g_B·(Aᵀ)⁺ = (1/s)·U·Q_Aᵀ = G·P_A    with U = g_B·T_A    (n, r)
    G2 = (1/s)·(Bᵀ)⁺·g_A = (1/s)·Q_B·V  = P_B·G    with V = T_Bᵀ·g_A   (r, m)

so ``‖G1‖ = ‖U‖/s``, ``‖G2‖ = ‖V‖/s`` and ``<G1, G2> = <Q_Bᵀ·U, V·Q_A>/s²``, an inner product of r x r
matrices. The transfer to B (Eq. 14), ``E_B = (1/s)·E_W·A⁺`` with ``A⁺ = Q_A·T_Aᵀ``, takes
``G1·A⁺ = (1/s)·U·T_Aᵀ`` and ``G2·A⁺ = (1/s)·Q_B·(V·Q_A)·T_Aᵀ``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from flatbench.adapters import LoRAFactors, lora_factors
from flatbench.errors import InputError

Estimate = Literal["average", "B", "tangent"]
Norm = Literal["global", "layer"]


@dataclass(frozen=True)
class Perturbation:
    """A perturbation of every B.

    Attributes:
        factors: the layers, in the order of ``values``.
        values: E_B of each layer, ``(n, r)``, in B's type.
        norm: ``sqrt(Σ ‖s·E_B·A‖²)``, the norm in the full space, 0-dimensional.
        skipped: whether there was no usable gradient, 0-dimensional bool; then every value is zero.
    """

    factors: Sequence[LoRAFactors]
    values: list[Tensor]
    norm: Tensor
    skipped: Tensor


class _Group:
    """Layers of one shape, type and device, treated as one batch of matrices."""

    def __init__(self, factors: Sequence[LoRAFactors]) -> None:
        self.factors = list(factors)
        first = self.factors[0].B
        self.device = first.device
        self.own_dtype = first.dtype
        # r x r work costs next to nothing, so it is done in float64 where the device has it
        self.dtype = torch.float32 if first.device.type == "mps" else torch.float64

    def stack(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
        """One tensor ``(layers, …)`` to compute with; a missing gradient counts as zero."""
        filled = [torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)]
        return torch.stack(filled).to(self.dtype)

    def weights(self) -> tuple[Tensor, Tensor]:
        """A ``(layers, r, m)`` and B ``(layers, n, r)``."""
        A, B = [f.A for f in self.factors], [f.B for f in self.factors]
        return self.stack(A, A), self.stack(B, B)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """g_A ``(layers, r, m)`` and g_B ``(layers, n, r)``."""
        A, B = [f.A for f in self.factors], [f.B for f in self.factors]
        return self.stack([p.grad for p in A], A), self.stack([p.grad for p in B], B)

    def scaling(self) -> Tensor:
        """s of each layer, ``(layers, 1, 1)``."""
        values = [f.scaling for f in self.factors]
        return torch.tensor(values, dtype=self.dtype, device=self.device)[:, None, None]

    def whitening(self, tall: Tensor) -> Tensor:
        """T ``(layers, r, r)`` such that ``X·T`` has orthonormal columns, for X ``(layers, k, r)``.

        Directions that are numerically zero are left out exactly where a pseudo-inverse of the parameters'
        precision leaves them out: singular values up to ``max(k, r)·eps`` of the largest. This happens in
        practice: after Adam's first step from B = 0 every entry of B is ±lr, and B has hardly more than a
        sign pattern's rank.
        """
        cut = max(tall.shape[-2:]) * torch.finfo(self.own_dtype).eps
        if self.own_dtype != self.dtype:  # a Gram matrix needs twice the digits
            triangle, _ = torch.linalg.cholesky_ex(tall.mT @ tall, upper=True)
            identity = torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device).expand_as(triangle)
            inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
            # an upper bound of the condition numbers: below 1/cut a pseudo-inverse leaves out nothing, and
            # below 1e4 the Gram matrix, which squares it, still gives T to 1e-8
            condition = torch.linalg.matrix_norm(tall) * torch.linalg.matrix_norm(inverse)
            if (condition < min(1 / cut, 1e4)).all():
                return inverse
        _, values, right = torch.linalg.svd(torch.linalg.qr(tall, mode="r").R, full_matrices=False)
        return right.mT * _inverse_above(values, cut)


def _inverse_above(values: Tensor, cut: float) -> Tensor:
    """Inverses of singular values ``(layers, r)`` as ``(layers, 1, r)``; 0 for those below the cut-off."""
    kept = values > cut * values.amax(-1, keepdim=True)
    return torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0).unsqueeze(-2)


class FullSpace:
    """All adapted weights of a model, for computing perturbations of their B factors.

    Raises:
        InputError: the model has no trainable LoRA factors.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self.factors = lora_factors(model)
        if not self.factors:
            raise InputError(
                f"{method} perturbs LoRA's B, and no LoRA layer of the model trains; wrap it with peft first"
            )

        def kind(f: LoRAFactors) -> tuple[str, ...]:
            return (str(f.B.shape), str(f.A.shape), str(f.B.dtype), str(f.B.device))

        self._groups = [_Group(list(group)) for _, group in groupby(sorted(self.factors, key=kind), kind)]
        self.factors = [factor for group in self._groups for factor in group.factors]

    @torch.no_grad()
    def perturbation(self, rho: float, estimate: Estimate, norm: Norm) -> Perturbation:
        """``E_B`` for the gradients that A and B hold now (Eq. 10-15).

        Args:
            rho: radius in the full space.
            estimate: what stands for the full gradient: ``average`` of G1 and G2 (G1 alone where B is
                zero), ``B`` G1 alone, ``tangent`` ``G1 + G2 - P_B·G1``, the best in LoRA's tangent space.
            norm: rho holds for all layers together (``global``) or for each (``layer``).
        """
        parts = [_direction(group, estimate) for group in self._groups]
        home = self._groups[0].device
        total = torch.stack([squares.sum().to(home) for _, squares in parts]).sum()
        values: list[Tensor] = []
        for group, (direction, squares) in zip(self._groups, parts, strict=True):
            squared = total.to(group.device).expand_as(squares) if norm == "global" else squares
            usable = torch.isfinite(squared) & (squared > 0)
            scale = torch.where(usable, rho / squared.sqrt(), 0.0)[:, None, None]
            value = torch.where(usable[:, None, None], direction * scale, 0.0)
            values += value.to(group.own_dtype).unbind()
        unusable = ~(torch.isfinite(total) & (total > 0))
        return Perturbation(self.factors, values, self.norm_of(values), unusable)

    @torch.no_grad()
    def norm_of(self, values: Sequence[Tensor]) -> Tensor:
        """``sqrt(Σ ‖s·E_B·A‖²)`` of perturbations in the order of ``factors``, with A as it is now."""
        home, start = self._groups[0].device, 0
        total = torch.zeros((), dtype=self._groups[0].dtype, device=home)
        for group in self._groups:
            E = torch.stack(list(values[start : start + len(group.factors)])).to(group.dtype)
            A, _ = group.weights()
            # ‖E·A‖² = tr(EᵀE·AAᵀ), an r x r product
            total += (group.scaling() ** 2 * ((E.mT @ E) * (A @ A.mT))).sum().to(home)
            start += len(group.factors)
        return total.sqrt()


def _direction(group: _Group, estimate: Estimate) -> tuple[Tensor, Tensor]:
    """``(1/s)·Ḡ·A⁺`` as ``(layers, n, r)`` and ‖Ḡ‖² as ``(layers,)``."""
    with torch.autocast(device_type=group.device.type, enabled=False):
        (A, B), (g_A, g_B), s = group.weights(), group.gradients(), group.scaling()
        T_A = group.whitening(A.mT)
        U = g_B @ T_A
        if estimate == "B":
            direction, squares = U, _square(U)
        else:
            T_B = group.whitening(B)
            V, Q_B = T_B.mT @ g_A, B @ T_B
            # Q_Bᵀ·U = V·Q_A for exact gradients (g_A·Aᵀ = Bᵀ·g_B); only rounding sets them apart
            from_B, from_A = Q_B.mT @ U, V @ (A.mT @ T_A)
            if estimate == "tangent":
                # Ḡ = G1 + G2 - P_B·G1; of the last two, the transfer leaves nothing
                direction, squares = U, _square(U) + _square(V) - _square(from_B)
            else:
                # at B = 0 the second estimate says nothing, and the first stands alone
                zero = ~B.flatten(1).any(1)[:, None, None]
                first, second = torch.where(zero, 1.0, 0.5), torch.where(zero, 0.0, 0.5)
                direction = first * U + second * (Q_B @ from_A)
                inner = (from_B * from_A).sum((-2, -1), keepdim=True)
                squares = first**2 * _square(U) + second**2 * _square(V) + 2 * first * second * inner
        return direction @ T_A.mT / s**2, (squares / s**2)[:, 0, 0]


def _square(matrices: Tensor) -> Tensor:
    """Squared Frobenius norm of each matrix of a batch, ``(layers, 1, 1)``."""
    return matrices.square().sum((-2, -1), keepdim=True)
