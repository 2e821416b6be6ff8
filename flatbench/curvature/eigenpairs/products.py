"""Products of a search, scaled to a handy size, and what is known of their rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatbench.curvature.operators.base import SymmetricOperator, symmetry_tolerance
from flatbench.errors import InputError
from flatbench.sums import length

#: products that contradict each other by this many times what rounding usually leaves are no rounding
_HARDLY_ROUNDING = 20


class ScaledProducts:
    """``H v`` divided by a power of two, so that a Hessian of size 1e-20 does not underflow in norms.

    Norms and errors are in units of the scaled products.

    Attributes:
        scale: the power of two, chosen at the first product that is not zero; 1 before.
        norm: of the longest product of a unit vector, a lower bound of ‖H‖.
        recent_norm: likewise, since `forget_recent`.
    """

    def __init__(self, operator: SymmetricOperator) -> None:
        self.operator = operator
        self.scale, self.norm, self.recent_norm = 1.0, 0.0, 0.0
        self._count = 0
        self._disagreement = 0.0  # of products with each other, relative to the norm
        self._underflow = 0.0  # of products that are next to the smallest numbers, likewise

    def of(self, vector: Tensor) -> Tensor:
        """The scaled product with a unit vector, a tensor of its own."""
        product = self.operator @ vector
        self._count += 1
        largest = float(product.abs().max()) if self.norm == 0 else 0.0
        if largest:
            self.scale = 2.0 ** max(math.frexp(largest)[1], -120)
        product = product / self.scale
        size = length(product)
        if largest:
            kind = torch.finfo(product.dtype)
            spacing = kind.tiny * kind.eps / self.scale  # of the smallest numbers
            self._underflow = spacing * math.sqrt(len(product)) / max(size, spacing)
        self.recent_norm = max(self.recent_norm, size)
        self.norm = max(self.norm, size)
        return product

    def forget_recent(self) -> None:
        """Begin to look at the norms of products anew."""
        self.recent_norm = 0.0

    def compare(self, difference: float) -> None:
        """Take note of how far two products that should agree are apart.

        Raises InputError if that is no rounding.
        """
        if difference > _HARDLY_ROUNDING * symmetry_tolerance(self.operator) * self.norm:
            raise InputError(
                f"the operator is not symmetric: its products contradict each other by "
                f"{difference / self.norm:.1e} of its norm{self.operator.coarse}"
            )
        # the products of a large model in single precision: their error is measured, and enters all others
        if self.norm:
            self._disagreement = max(self._disagreement, difference / self.norm)

    def error(self, largest: float) -> float:
        """What precision makes of an eigenvalue, in a spectrum that reaches to ``largest``.

        It grows as a random walk does: each product, and each restart after some, adds its own rounding.
        """
        eps = float(torch.finfo(self.operator.dtype).eps)
        known = self.operator.relative_error + self._disagreement + self._underflow
        return max(self.norm, largest) * ((32 + 4 * math.sqrt(self._count)) * eps + known)

    def error_in_a_direction(self, largest: float) -> float:
        """What rounding adds to an eigenvector's part in a recent product, spread over all directions."""
        eps = 4 * float(torch.finfo(self.operator.dtype).eps)
        # more than rounding usually leaves
        beyond = max(self._disagreement - symmetry_tolerance(self.operator), 0.0) * self.norm
        own = eps + self.operator.relative_error + self._underflow
        return (max(self.recent_norm, largest) * own + beyond) / math.sqrt(self.operator.dimension)
