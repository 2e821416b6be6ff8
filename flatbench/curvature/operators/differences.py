"""Hessian-vector products by central differences of gradients, with a chosen step and its error."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flatbench.sums import norm

#: steps that are tried, relative to the length of the weights, by the precision of the weights
_STEPS = {
    torch.float64: (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    torch.float32: (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4),
}
_COARSE = (3e-1, 1e-1, 3e-2, 1e-2)


class Differences:
    """``H·v ≈ (g(w + h·u) − g(w − h·u)) · ‖v‖ / 2h`` with ``u = v/‖v‖``: two gradients a product.

    Its error is of order h² from the third derivatives of the gradient, and of order eps/h from rounding.

    Args:
        parameters: the weights w; moved during a product and put back bit for bit.
        gradient: the gradient ``(n,)`` at the weights as they are when it is called.

    Attributes:
        step: h.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], gradient: Callable[[], Tensor]) -> None:
        self.parameters, self.gradient = parameters, gradient
        self.step = 1e-3

    def choose_step(self, direction: Tensor) -> float:
        """Try steps along a direction and keep the one whose product changes least to the next.

        Args:
            direction: ``(n,)``, one in which there is curvature, such as the gradient.

        Returns:
            The relative error that is left, by that change.
        """
        length = float(
            torch.linalg.vector_norm(torch.stack([norm(p.detach()).float() for p in self.parameters]))
        )
        if not float(norm(direction)):
            generator = torch.Generator().manual_seed(0)
            direction = torch.randn(len(direction), generator=generator).to(direction)
        kinds = {p.dtype for p in self.parameters}
        steps = _STEPS[next(iter(kinds))] if len(kinds) == 1 and next(iter(kinds)) in _STEPS else _COARSE
        found = []
        for relative in steps:
            self.step = relative * (length or 1.0)
            found.append((self.step, self.product(direction)))
        changes = []
        for (_, larger), (step, smaller) in itertools.pairwise(found):
            scale = max(float(norm(smaller)), float(norm(larger)))
            changes.append((float(norm(larger - smaller)) / scale if scale else 0.0, step))
        error, self.step = min(changes)
        return error

    def product(self, vector: Tensor) -> Tensor:
        """``H @ vector`` for a vector ``(n,)``."""
        length = float(norm(vector))
        if length == 0:
            return torch.zeros_like(vector)
        with self._displace(vector, self.step / length):
            forward = self.gradient()
        with self._displace(vector, -self.step / length):
            backward = self.gradient()
        return (forward - backward).mul_(length / (2 * self.step))

    @contextmanager
    def _displace(self, vector: Tensor, scale: float) -> Iterator[None]:
        saved = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                parts = vector.split([p.numel() for p in self.parameters])
                for parameter, part in zip(self.parameters, parts, strict=True):
                    # added in the vector's precision and rounded once
                    moved = parameter.to(part.dtype) + scale * part.view_as(parameter)
                    parameter.copy_(moved)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(self.parameters, saved, strict=True):
                    parameter.copy_(old)
