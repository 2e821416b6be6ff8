"""Balls of perturbations around trained weights: plain, adaptive, and in LoRA's invariant metric."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from flatbench import sums
from flatbench.errors import NotApplicableError
from flatbench.models import factors
from flatbench.subject.spaces import Point

Norm = Literal["l2", "linf"]
#: ``plain``: the ball of the parameters; ``adaptive``: scaled by the weights' sizes; ``invariant``: of what
#: the perturbation does to the merged weights, to first order
Metric = Literal["plain", "adaptive", "invariant"]


class Ball:
    """``{ε = C u : ‖u‖ ≤ rho}`` in l2 or l∞, with C linear: the perturbation in coordinates u ``(n,)``.

    ``adaptive`` (Andriushchenko et al. 2023, arXiv 2302.07011): ``C = diag(|w| + floor · rms(w))``. Nothing
    is divided by a weight; the floor moves weights that are zero, as LoRA's B at its start.

    ``invariant`` (l2, ``adapter`` space in the balanced gauge): ``‖u‖² = s²·Σ Tr(K ΔBᵀΔB) + Tr(K ΔA ΔAᵀ)``
    over the layers, with ``K = AAᵀ = BᵀB`` damped by ``floor · tr K / r``. It does not change under
    (B·M)(M⁻¹·A), and rho is in units of W. Kernels of convolutions count as matrices.

    Raises NotApplicableError for a metric that the space or the norm does not have.
    """

    def __init__(self, point: Point, metric: Metric, norm: Norm, floor: float) -> None:
        self.point, self.norm = point, norm
        parameters = list(point.parameters.values())
        self._shapes = [p.shape for p in parameters]
        self._like = parameters[0]
        self._kind = functools.reduce(torch.promote_types, (p.dtype for p in parameters), torch.float32)
        self.size = sum(shape.numel() for shape in self._shapes)
        maps: list[Callable[[Tensor], Tensor]]
        if metric == "invariant":
            if point.space != "adapter" or norm != "l2":
                raise NotApplicableError("the invariant metric is an l2 norm of the adapter space")
            maps = self._invariant(floor)
        elif metric == "adaptive":
            total = sum(float(p.detach().double().square().sum()) for p in parameters)
            least = floor * (total / self.size) ** 0.5
            scales = [p.detach().to(self._kind).abs() + least for p in parameters]
            maps = [scale.mul for scale in scales]
        else:
            maps = [lambda part: part] * len(parameters)
        self._maps = maps

    def _invariant(self, floor: float) -> list[Callable[[Tensor], Tensor]]:
        """For each factor the map ``u_B ↦ u_B K^{-½}/s`` or ``u_A ↦ K^{-½} u_A/s``, which is symmetric."""
        found: dict[int, Callable[[Tensor], Tensor]] = {}
        for factor in factors.measured_factors(self.point.model):
            A = factor.A.detach().to(self._kind).flatten(1)
            values, vectors = torch.linalg.eigh(A @ A.T)
            damped = values.clamp_min(0) + floor * values.mean()
            if float(damped.min()) <= float(torch.finfo(self._kind).eps) * float(damped.max()):
                raise NotApplicableError(
                    f"{factor.name}: the invariant metric is zero in some directions (its rank is below "
                    f"{len(values)}); a floor above 0 damps it"
                )
            root = (vectors / damped.sqrt()) @ vectors.T / factor.scaling
            found[id(factor.B)] = partial(_times, right=root)
            found[id(factor.A)] = partial(_times, left=root)
        if set(found) != {id(p) for p in self.point.parameters.values()}:
            raise NotApplicableError("the invariant metric knows A and B only; the adapter trains more")
        return [found[id(p)] for p in self.point.parameters.values()]

    def step(self, u: Tensor) -> list[Tensor]:
        """ε, a tensor per parameter."""
        parts = u.split([shape.numel() for shape in self._shapes])
        return [
            mapped(part.view(shape))
            for mapped, part, shape in zip(self._maps, parts, self._shapes, strict=True)
        ]

    def pulled(self, gradient: list[Tensor]) -> Tensor:
        """The gradient in u: ``Cᵀ g``, and every C here is symmetric."""
        return torch.cat([m(g.to(self._kind)).flatten() for m, g in zip(self._maps, gradient, strict=True)])

    def zero(self) -> Tensor:
        """The trained point."""
        return torch.zeros(self.size, dtype=self._kind, device=self._like.device)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 along which a function with this gradient rises fastest."""
        if self.norm == "linf":
            return gradient.sign()
        unit: Tensor = gradient / sums.norm(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
        return unit

    def project(self, u: Tensor, rho: float) -> Tensor:
        """The nearest point of the ball."""
        if self.norm == "linf":
            return u.clamp(-rho, rho)
        length = float(sums.norm(u))
        return u * (rho / length) if length > rho else u

    def drawn(self, rho: float, seed: int) -> Tensor:
        """A random u: each entry ``N(0, rho²)`` (l2) or ``U(−rho, rho)`` (l∞), for average sharpness."""
        generator = torch.Generator().manual_seed(seed)
        if self.norm == "linf":
            found = torch.rand(self.size, generator=generator, dtype=torch.float64) * 2 - 1
        else:
            found = torch.randn(self.size, generator=generator, dtype=torch.float64)
        return (rho * found).to(self.zero())

    def inside(self, rho: float, seed: int) -> Tensor:
        """A random point of the ball, to start an ascent from."""
        drawn = self.drawn(rho, seed)
        return drawn if self.norm == "linf" else drawn * (rho / float(sums.norm(drawn)))


def _times(part: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """A factor, or a kernel as a matrix, times another matrix from one side."""
    matrix = part.flatten(1)
    product = matrix if left is None else left @ matrix
    return (product if right is None else product @ right).reshape(part.shape)
