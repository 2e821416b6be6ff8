"""LoRA's symmetry: (B·M)(M⁻¹·A) is the same model for every invertible M; a canonical choice among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from flatbench.errors import NotApplicableError
from flatbench.models import factors as lora
from flatbench.subject.spaces import Point


@contextlib.contextmanager
def balanced(point: Point) -> Iterator[None]:
    """Inside, every adapter is in the gauge with ``BᵀB = AAᵀ``, diagonal; afterwards as it was, bit for bit.

    From the thin QR decompositions of B and Aᵀ and the SVD of their r×r product:
    ``B = Q_B U S^½``, ``A = S^½ Vᵀ Q_Aᵀ``, with zeros where the rank exceeds the matrix. The model computes
    the same. A convolution's kernel counts as a matrix, see `flatbench.models.factors.LoRAFactors`.

    Raises NotApplicableError outside of the ``adapter`` space, or if an adapter's B·A is zero.
    """
    if point.space != "adapter":
        raise NotApplicableError(f"the {point.space} space has no gauge: it does not depend on A and B")
    factors = lora.measured_factors(point.model)
    saved = [(f, f.A.detach().clone(), f.B.detach().clone()) for f in factors]
    try:
        with torch.no_grad():
            for factor in factors:
                B, A = _balance(factor.B, factor.A, factor.name)
                factor.B.copy_(B)
                factor.A.copy_(A)
        yield
    finally:
        with torch.no_grad():
            for factor, A, B in saved:
                factor.A.copy_(A)
                factor.B.copy_(B)


def _balance(B: Tensor, A: Tensor, name: str) -> tuple[Tensor, Tensor]:
    kind, rank = torch.promote_types(B.dtype, torch.float32), len(A)
    q_b, r_b = torch.linalg.qr(B.to(kind).flatten(1))
    q_a, r_a = torch.linalg.qr(A.to(kind).flatten(1).T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if not bool(s[0] > 0):
        raise NotApplicableError(f"{name}: B·A is zero, so that there is no balanced gauge")
    root = s.sqrt()
    left, right = q_b @ (u * root), (root[:, None] * vh) @ q_a.T
    missing = rank - len(root)
    left = torch.nn.functional.pad(left, (0, missing))
    right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left.reshape(B.shape), right.reshape(A.shape)
