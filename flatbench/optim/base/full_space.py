"""The full-space gradient of adapted weights from LoRA's own gradients, without forming an n x m matrix.

For ``W = W0 + s·B·A`` with B ``(n, r)`` and A ``(r, m)``, let ``T_A`` and ``T_B`` be the r x r matrices that
whiten the factors: ``Q_A = Aᵀ·T_A`` and ``Q_B = B·T_B`` have orthonormal columns, ``(A·Aᵀ)⁺ = T_A·T_Aᵀ``. The
two estimates of arXiv 2508.00522 are projections of the true gradient G, and their mean is Ḡ (Eq. 12):

    G1 = (1/s)·g_B·(Aᵀ)⁺ = (1/s)·U·Q_Aᵀ = G·P_A    with U = g_B·T_A    (n, r)    Eq. 10
    G2 = (1/s)·(Bᵀ)⁺·g_A = (1/s)·Q_B·V  = P_B·G    with V = T_Bᵀ·g_A   (r, m)    Eq. 11

so ``‖G1‖ = ‖U‖/s``, ``‖G2‖ = ‖V‖/s`` and ``<G1, G2> = <Q_Bᵀ·U, V·Q_A>/s²``, an inner product of r x r
matrices. The transfer to B (Eq. 14), ``E_B = (1/s)·E_W·A⁺`` with ``A⁺ = Q_A·T_Aᵀ``, takes
``G1·A⁺ = (1/s)·U·T_Aᵀ`` and ``G2·A⁺ = (1/s)·Q_B·(V·Q_A)·T_Aᵀ``.

The transfer to A is the same with every matrix transposed, which exchanges A with Bᵀ. So the code knows a
``carrier`` (k, r), which moves, and its ``partner`` (l, r): B and Aᵀ, or Aᵀ and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.models.factors import LoRAFactors, lora_factors, refuse_attention
from flatbench.optim.base.radius import Norm

Estimate = Literal["average", "B", "tangent"]
Factor = Literal["B", "A"]


class _Layer:
    """One adapted weight, seen from the factor that moves."""

    def __init__(self, factors: LoRAFactors, carrier: Factor) -> None:
        self.factors = factors
        # peft starts an embedding with A = 0 instead of B = 0, so the roles are exchanged
        self.in_A = (carrier == "A") != (factors.kind == "embedding")
        self.carrier, self.partner = (factors.A, factors.B) if self.in_A else (factors.B, factors.A)

    def key(self) -> tuple[str, ...]:
        """Layers with equal keys can be treated as one batch."""
        shapes = (self.carrier.shape, self.partner.shape)
        return (str(self.in_A), str(shapes), str(self.carrier.dtype), str(self.partner.requires_grad))


class _Group:
    """Layers of one shape and type, treated as one batch of matrices."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.layers = list(layers)
        self.in_A = layers[0].in_A
        self.carriers: list[Tensor] = [layer.carrier for layer in layers]
        self.partners: list[Tensor] = [layer.partner for layer in layers]
        self.partner_trains = layers[0].partner.requires_grad
        self._scales: tuple[list[float], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the layers are now; a model may be moved after its optimizer was made."""
        return self.carriers[0].device

    @property
    def own_dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.carriers[0].dtype

    @property
    def dtype(self) -> torch.dtype:
        """Type to compute in: r x r work costs next to nothing, so float64 where the device has it."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def _stack(self, tensors: Sequence[Tensor | None], like: Sequence[Tensor], transposed: bool) -> Tensor:
        """Tall matrices ``(layers, k, r)`` to compute with; a missing gradient counts as zero."""
        filled = [torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)]
        stacked = torch.stack(filled).to(self.dtype).flatten(2)
        return stacked.mT if transposed else stacked

    def weights(self) -> tuple[Tensor, Tensor]:
        """Carriers ``(layers, k, r)`` and partners ``(layers, l, r)``."""
        return (
            self._stack(self.carriers, self.carriers, self.in_A),
            self._stack(self.partners, self.partners, not self.in_A),
        )

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Their gradients in the same shapes."""
        return (
            self._stack([p.grad for p in self.carriers], self.carriers, self.in_A),
            self._stack([p.grad for p in self.partners], self.partners, not self.in_A),
        )

    def unstack(self, values: Tensor) -> list[Tensor]:
        """``(layers, k, r)`` as a tensor a layer in the carrier's shape and type."""
        values = values.mT if self.in_A else values
        stacked = values.to(self.own_dtype).reshape(len(self.carriers), *self.carriers[0].shape)
        return list(stacked.unbind())

    def scaling(self) -> Tensor:
        """s of each layer, ``(layers, 1, 1)``; copied to the device only when it has changed."""
        values = [layer.factors.scaling for layer in self.layers]
        if self._scales is None or self._scales[0] != values or self._scales[1].device != self.device:
            found = torch.tensor(values, dtype=self.dtype, device=self.device)[:, None, None]
            self._scales = (values, found)
        return self._scales[1]

    def whitening(self, tall: Tensor) -> Tensor:
        """T ``(layers, r, r)`` such that ``X·T`` has orthonormal columns, for X ``(layers, k, r)``.

        Directions that are numerically zero are left out where a pseudo-inverse of the parameters' precision
        leaves them out: singular values up to ``max(k, r)·eps`` of the largest, and at most a hundredth of
        it, or half precision would leave out everything. This happens in practice: after Adam's first step
        from B = 0 every entry of B is ±lr, and B has hardly more than a sign pattern's rank.
        """
        cut = min(max(tall.shape[-2:]) * torch.finfo(self.own_dtype).eps, 1e-2)
        return damped_whitening(tall, cut) if tall.device.type != "cpu" else self._exact(tall, cut)

    def _exact(self, tall: Tensor, cut: float) -> Tensor:
        # a diverged layer has no inverse, and a decomposition would raise an error for all of its batch
        tall = torch.where(torch.isfinite(tall.flatten(1).sum(1))[:, None, None], tall, 0.0)
        if self.own_dtype != self.dtype:  # a Gram matrix needs twice the digits
            gram = tall.mT @ tall
            triangle, _ = torch.linalg.cholesky_ex(gram, upper=True)
            identity = torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device).expand_as(triangle)
            inverse: Tensor = torch.linalg.solve_triangular(triangle, identity, upper=True)
            # an upper bound of the condition numbers: below 1/cut a pseudo-inverse leaves out nothing, and
            # below 1e4 the Gram matrix, which squares it, still gives T to 1e-8
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            condition = trace.sqrt() * torch.linalg.matrix_norm(inverse)
            if (condition < min(1 / cut, 1e4)).all():
                return inverse
            if cut > 1e-5:  # the squared cut-off is far above the Gram matrix's rounding
                squares, right = torch.linalg.eigh(gram)
                whitening: Tensor = right * _inverse_above(squares.clamp_min(0).sqrt(), cut)
                return whitening
        _, values, right = torch.linalg.svd(torch.linalg.qr(tall, mode="r").R, full_matrices=False)
        whitening = right.mT * _inverse_above(values, cut)
        return whitening


def damped_whitening(tall: Tensor, cut: float) -> Tensor:
    """What `_Group.whitening` gives, by one Cholesky factorisation that an accelerator does not wait for.

    ``(cut·σ_max)²`` is added to the Gram matrix's diagonal (with ‖X‖ for σ_max): singular values σ count by
    ``σ²/(σ² + (cut·‖X‖)²)`` where a pseudo-inverse counts them by one or zero. A matrix of zeros gives zeros.
    """
    gram = tall.mT @ tall
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    identity = torch.eye(tall.shape[-1], dtype=tall.dtype, device=tall.device)
    usable = torch.isfinite(trace) & (trace > 0)
    least = 64 * torch.finfo(tall.dtype).eps
    damped = torch.where(usable, gram + max(cut**2, least) * trace * identity, identity)
    triangle, _ = torch.linalg.cholesky_ex(damped, upper=True)
    inverse = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=True)
    return torch.where(usable, inverse, 0.0)


def _inverse_above(values: Tensor, cut: float) -> Tensor:
    """Inverses of singular values ``(layers, r)`` as ``(layers, 1, r)``; 0 for those below the cut-off."""
    kept = values > cut * values.amax(-1, keepdim=True)
    return torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0).unsqueeze(-2)


class FullSpace:
    """All adapted weights of a model, for computing perturbations of one factor of each.

    Args:
        carrier: the factor that moves. In an embedding it is the other one, because peft starts an embedding
            with A = 0 where it starts other layers with B = 0, and a factor next to zeros moves nothing.

    Raises:
        InputError: no LoRA layer trains, or only the factor that would not move.
    """

    def __init__(self, model: nn.Module, method: str, carrier: Factor = "B") -> None:
        layers = [_Layer(factors, carrier) for factors in lora_factors(model)]
        if not layers:
            raise InputError(
                f"{method} perturbs a factor of LoRA, and no LoRA layer of the model trains; wrap it with "
                "peft first"
            )
        refuse_attention(method, model, doubled_only=True)
        for layer in layers:
            if not layer.carrier.requires_grad:
                letter = "A" if layer.in_A else "B"
                raise InputError(
                    f"{method}: {letter} of {layer.factors.name} is frozen, and it would be perturbed; "
                    f"let it train, or choose factor: {'B' if letter == 'A' else 'A'}"
                )
        grouped = groupby(sorted(layers, key=_Layer.key), _Layer.key)
        self._groups = [_Group(list(group)) for _, group in grouped]
        #: the adapted weights, and the parameters that move, in the order of every perturbation's values
        self.factors = [layer.factors for group in self._groups for layer in group.layers]
        self.weights: list[Tensor] = [weight for group in self._groups for weight in group.carriers]

    @torch.no_grad()
    def perturbation(self, rho: float, estimate: Estimate, norm: Norm) -> tuple[list[Tensor], Tensor]:
        """E for the gradients that A and B hold now (arXiv 2508.00522, Eq. 10 to Eq. 15).

        Args:
            rho: radius in the full space.
            estimate: what stands for the full gradient: ``average`` of G1 and G2 (G1 alone where B is zero
                or A is frozen), ``B`` G1 alone, ``tangent`` ``G1 + G2 - P_B·G1``, the best in LoRA's tangent
                space. Where A moves, read G2 for G1.
            norm: rho holds for all layers together (``global``) or for each (``layer``).

        Returns:
            E of each layer in the shape and type of its factor, in the order of ``weights``; and whether
            there was no usable gradient, 0-dimensional bool: then every E is zero.
        """
        parts = [_estimate(group, estimate) for group in self._groups]
        home = self._groups[0].device
        total = torch.stack([part.squares.sum().to(home) for part in parts]).sum()
        values: list[Tensor] = []
        for group, part in zip(self._groups, parts, strict=True):
            squared = total.to(group.device).expand_as(part.squares) if norm == "global" else part.squares
            usable = torch.isfinite(squared) & (squared > 0)
            # Eq. 13: E_W = rho·Ḡ/‖Ḡ‖
            scale = torch.where(usable, rho / squared.sqrt(), 0.0)[:, None, None]
            # Eq. 14: E_B = (1/s)·E_W·A⁺; zero where there is no usable gradient
            values += group.unstack(torch.where(usable[:, None, None], part.transferred(scale), 0.0))
        return values, ~(torch.isfinite(total) & (total > 0))

    @torch.no_grad()
    def norm_of(self, values: Sequence[Tensor]) -> Tensor:
        """``sqrt(Σ ‖s·E·A‖²)`` of perturbations in the order of ``weights``, with A as it is now."""
        home, start = self._groups[0].device, 0
        total = torch.zeros((), dtype=self._groups[0].dtype, device=home)
        for group in self._groups:
            E = group._stack(values[start : start + len(group.layers)], group.carriers, group.in_A)
            _, partner = group.weights()
            # ‖E·A‖² = tr(EᵀE·AAᵀ), an r x r product
            total += (group.scaling() ** 2 * ((E.mT @ E) * (partner.mT @ partner))).sum().to(home)
            start += len(group.layers)
        return total.sqrt()


class _TransferredGradient:
    """``(1/s)·Ḡ·A⁺`` of a group as ``U·P + carrier·Q``, with r x r matrices P and Q. Ḡ is never formed.

    Attributes:
        squares: ‖Ḡ‖² of each layer, ``(layers,)``.
    """

    def __init__(self, U: Tensor, P: Tensor, squares: Tensor, s: Tensor) -> None:
        self._U, self._P, self._s = U, P / s**2, s
        self._carrier: Tensor | None = None
        self.squares = (squares / s**2)[:, 0, 0]

    def and_carrier(self, carrier: Tensor, Q: Tensor) -> _TransferredGradient:
        """With ``carrier·Q`` beside ``U·P``."""
        self._carrier, self._Q = carrier, Q / self._s**2
        return self

    def transferred(self, scale: Tensor) -> Tensor:
        """``E_B = (1/s)·E_W·A⁺`` for ``E_W = scale·Ḡ`` (Eq. 14), ``(layers, k, r)``."""
        found = self._U @ (self._P * scale)
        return found if self._carrier is None else torch.baddbmm(found, self._carrier, self._Q * scale)


def _estimate(group: _Group, estimate: Estimate) -> _TransferredGradient:
    """Ḡ of each layer of a group (Eq. 12) as its transfer to B, from G1 (Eq. 10) and G2 (Eq. 11).

    With ``Q_A``, ``Q_B`` orthonormal bases of the factors' spans: U is ``s·G1·Q_A`` and V is ``s·Q_Bᵀ·G2``.
    """
    with torch.autocast(device_type=group.device.type, enabled=False):
        (carrier, partner), s = group.weights(), group.scaling()
        g_carrier, g_partner = group.gradients()
        T_A = group.whitening(partner)
        U = g_carrier @ T_A  # Eq. 10: G1 = (1/s)·g_B·(Aᵀ)⁺
        if estimate == "B" or not group.partner_trains:
            return _TransferredGradient(U, T_A.mT, _square(U), s)
        T_B = group.whitening(carrier)
        V = T_B.mT @ g_partner.mT  # Eq. 11: G2 = (1/s)·(Bᵀ)⁺·g_A
        # Q_Bᵀ·U = V·Q_A for exact gradients (g_A·Aᵀ = Bᵀ·g_B); only rounding sets them apart
        from_B, from_A = T_B.mT @ (carrier.mT @ U), (V @ partner) @ T_A
        if estimate == "tangent":
            # Ḡ = G1 + G2 - P_B·G1; of the last two, the transfer leaves nothing
            return _TransferredGradient(U, T_A.mT, _square(U) + _square(V) - _square(from_B), s)
        # Eq. 12: Ḡ = (G1 + G2)/2; at B = 0 the second estimate says nothing, and the first stands alone
        zero = ~carrier.flatten(1).any(1)[:, None, None]
        first, second = torch.where(zero, 1.0, 0.5), torch.where(zero, 0.0, 0.5)
        inner = (from_B * from_A).sum((-2, -1), keepdim=True)
        squares = first**2 * _square(U) + second**2 * _square(V) + 2 * first * second * inner
        found = _TransferredGradient(U, first * T_A.mT, squares, s)
        return found.and_carrier(carrier, second * (T_B @ from_A @ T_A.mT))


def _square(matrices: Tensor) -> Tensor:
    """Squared Frobenius norm of each matrix of a batch, ``(layers, 1, 1)``."""
    squares: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).square()
    return squares
