"""Losses whose sharpness and slices are known in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from flatbench.subject.subject import Subject


class Quadratic(nn.Module):
    """``½ wᵀ H w + bᵀ w`` in ``w``, a matrix taken as a vector; each "example" scales it."""

    def __init__(self, curvature: Tensor, slope: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
        self.layer.weight.data = weight.clone()
        self.register_buffer("curvature", curvature)
        self.register_buffer("slope", slope)

    def forward(self, scale: Tensor) -> SimpleNamespace:
        w = self.layer.weight.flatten()
        return SimpleNamespace(loss=scale.mean() * (w @ self.curvature @ w / 2 + self.slope @ w))


@dataclass(frozen=True)
class Known:
    """The subject; and H, the gradient and the weights at its point, flat."""

    subject: Subject
    curvature: Tensor
    gradient: Tensor
    weight: Tensor


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    return model(**batch).loss, len(batch["scale"])


def known(eigenvalues: list[float], slope: float = 1.0, seed: int = 0) -> Known:
    """A quadratic in a ``(3, n/3)`` weight, over ragged batches whose scales have mean 1."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, _ = torch.linalg.qr(normal(size, size))
    curvature = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    weight, direction = normal(3, size // 3), normal(size)
    gradient = slope * direction
    model = Quadratic(curvature, gradient - curvature @ weight.flatten(), weight)
    batches = [{"scale": torch.tensor(s).double()} for s in ([0.5, 2.5, 1.0, 1.0], [0.0, 1.0])]
    subject = Subject(model, batches, loss, ["layer"], seed=5)
    return Known(subject, curvature, gradient, weight.flatten())


def ball_maximum(curvature: Tensor, gradient: Tensor, rho: float) -> float:
    """``max_{‖ε‖ ≤ rho} gᵀε + ½ εᵀHε`` for an H with a positive eigenvalue, from the secular equation.

    On the sphere ``(μI − H)ε = g`` with ``μ ≥ λ_max`` and ``‖ε‖ = rho`` (Moré and Sorensen 1983).
    """
    values, vectors = torch.linalg.eigh(curvature)
    g = vectors.T @ gradient
    top = float(values[-1])

    def excess(shift: float) -> float:
        return float((g / (top + shift - values)).norm()) - rho

    shift = brentq(excess, 1e-9, 1e9, xtol=1e-14)
    e = g / (top + shift - values)
    return float(g @ e + (values * e) @ e / 2)
