"""Inner products and lengths of long vectors, to the precision that the vectors have.

torch's own sum up in float32: on a CPU the length of 77 million numbers is off by 0.6 % then, and their inner
product by 0.4 %. Here blocks are summed in the vectors' precision and added up in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: elements that are summed in the vectors' own precision
_SUMMED = 1 << 11
#: elements of which torch's own norm and inner product on a CPU are right to about 1e-5
_SHORT = 1 << 20


def is_long(tensor: Tensor) -> bool:
    """Whether torch's own sums over a tensor are off by more than single precision is: long, on a CPU."""
    return tensor.numel() > _SHORT and tensor.device.type == "cpu" and tensor.dtype != torch.float64


def dot(one: Tensor, other: Tensor) -> float:
    """``⟨one, other⟩`` of vectors ``(n,)``."""
    pairs = zip(_blocks(one), _blocks(other), strict=True)
    return sum(float(torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).double().sum()) for a, b in pairs)


def length(vector: Tensor) -> float:
    """``‖vector‖₂`` of a vector ``(n,)``; of numbers too small to be squared too."""
    largest = float(torch.linalg.vector_norm(vector, math.inf)) if len(vector) else 0.0
    if not math.isfinite(largest) or largest == 0:
        return largest
    if 1e-10 < largest < 1e10:  # squares neither vanish nor overflow
        return math.sqrt(dot(vector, vector))
    scaled = vector / largest
    return largest * math.sqrt(dot(scaled, scaled))


def lengths(columns: Tensor) -> Tensor:
    """The `length` of each column of ``(n, m)``, as ``(m,)`` of its type and on its device."""
    return torch.tensor([length(column) for column in columns.T], dtype=columns.dtype, device=columns.device)


def norm(tensor: Tensor) -> Tensor:
    """``‖tensor‖₂`` of any shape, 0-dimensional, float32 at least; accelerators are not waited for.

    torch's own where that is right, to the bit.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    whole: Tensor
    if is_long(tensor):
        rows = [torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in _blocks(tensor.flatten())]
        whole = torch.linalg.vector_norm(torch.cat(rows).double()).to(dtype)
    else:
        whole = torch.linalg.vector_norm(tensor, dtype=dtype)
    return whole


def inner(one: Tensor, other: Tensor) -> Tensor:
    """``⟨one, other⟩`` of vectors ``(n,)`` of one dtype, 0-dimensional; torch's own where that is right."""
    return torch.tensor(dot(one, other), dtype=one.dtype) if is_long(one) else torch.dot(one, other)


def _blocks(vector: Tensor) -> list[Tensor]:
    """The vector as rows short enough for torch's own sums, and what is left over as a last row."""
    even = len(vector) // _SUMMED * _SUMMED
    return [vector[:even].view(-1, _SUMMED), vector[even:].view(1, -1)]
