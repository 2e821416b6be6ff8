"""The rules of arXiv 2508.00522 written plainly: n x m gradients and explicit pseudo-inverses.

Nothing here is shared with `flatbench.optim`; matrices are taken from the parameters and computed on in
float64, layer by layer, as the paper prints them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def pinv(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Pseudo-inverse computed in float64, with torch's default cut-off for a matrix of type ``dtype``."""
    return torch.linalg.pinv(matrix.double(), rtol=max(matrix.shape) * torch.finfo(dtype).eps)


def full_gradient(
    A: Tensor, B: Tensor, g_A: Tensor, g_B: Tensor, s: float, estimate: str, dtype: torch.dtype
) -> Tensor:
    """Ḡ of Eq. 12, ``(n, m)``, from G1 (Eq. 10) and G2 (Eq. 11)."""
    G1 = g_B @ pinv(A.T, dtype) / s
    if not B.any() or estimate == "B":
        return G1
    G2 = pinv(B.T, dtype) @ g_A / s
    if estimate == "tangent":
        return G1 + G2 - B @ pinv(B, dtype) @ G1
    return (G1 + G2) / 2


@dataclass
class Layer:
    """One adapted weight."""

    A: torch.nn.Parameter
    B: torch.nn.Parameter
    s: float


@dataclass
class Reference:
    """Flat-LoRA (``beta`` None) or EFlat-LoRA, a step at a time around ``base``."""

    layers: list[Layer]
    base: torch.optim.Optimizer
    rho: float
    beta: float | None = None
    estimate: str = "average"
    norm: str = "global"
    average: list[Tensor] | None = None
    clean: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)

    def perturbations(self) -> list[Tensor]:
        """E_B of every layer in float64: E_W (Eq. 13) transferred to B (Eq. 14)."""
        gradients = []
        for layer in self.layers:
            A, B = layer.A.detach().double(), layer.B.detach().double()
            g_A = layer.A.grad.double()
            g_B = layer.B.grad.double()
            gradients.append(full_gradient(A, B, g_A, g_B, layer.s, self.estimate, layer.A.dtype))
        total = math.sqrt(sum(float(G.norm()) ** 2 for G in gradients))
        found = []
        for layer, G in zip(self.layers, gradients, strict=True):
            E_W = self.rho * G / (total if self.norm == "global" else float(G.norm()))
            found.append(E_W @ pinv(layer.A.detach(), layer.A.dtype) / layer.s)
        self.last = found
        return found

    def _move(self, E: list[Tensor]) -> None:
        self.clean = [layer.B.detach().clone() for layer in self.layers]
        for layer, e in zip(self.layers, E, strict=True):
            layer.B.data.add_(e.to(layer.B.dtype))

    def _back(self) -> None:
        for layer, B in zip(self.layers, self.clean, strict=True):
            layer.B.data.copy_(B)

    def step(self, closure) -> None:
        """One step of the method."""
        closure()
        E = self.perturbations()
        if self.beta is None:
            self._move(E)
            closure()
            self._back()
            self.base.step()
            return
        if self.average is None:
            self.average = E
        else:
            self._back()
            self.average = [
                (1 - self.beta) * old + self.beta * new for old, new in zip(self.average, E, strict=True)
            ]
        self.base.step()
        self._move(self.average)

    def finish(self) -> None:
        """To the unperturbed point."""
        if self.beta is not None and self.clean:
            self._back()
