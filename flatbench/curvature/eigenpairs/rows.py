"""A growing stack of long vectors that takes no more memory than the vectors in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatbench.sums import dot

#: vectors that are allocated together
_CHUNK = 16
#: columns that are recombined together
COLUMNS = 1 << 16
#: columns that are summed in the vectors' own precision
_SUMMED = 1 << 15


def gram_root(vectors: Sequence[Tensor]) -> Tensor:
    """R ``(q, q)`` with ``RᵀR`` the products of q vectors with each other, in float64 on the CPU."""
    if not vectors:
        return torch.zeros(0, 0, dtype=torch.float64)
    products = torch.tensor([[dot(a, b) for b in vectors] for a in vectors], dtype=torch.float64)
    squares, eigenvectors = torch.linalg.eigh(products)
    root: Tensor = squares.clamp_min(0).sqrt()[:, None] * eigenvectors.T
    return root


class Rows:
    """Vectors ``(n,)`` as rows, in chunks, so that adding one copies none.

    Args:
        dimension: n.
    """

    def __init__(self, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dimension, self.dtype, self.device = dimension, dtype, device
        self._chunks: list[Tensor] = []
        self.count = 0

    def append(self, vector: Tensor) -> None:
        """Add a vector at the end."""
        if self.count == _CHUNK * len(self._chunks):
            chunk = torch.empty(_CHUNK, self.dimension, dtype=self.dtype, device=self.device)
            self._chunks.append(chunk)
        self._chunks[self.count // _CHUNK][self.count % _CHUNK] = vector
        self.count += 1

    def __getitem__(self, index: int) -> Tensor:
        return self._chunks[index // _CHUNK][index % _CHUNK]

    def _views(self) -> list[Tensor]:
        full, rest = divmod(self.count, _CHUNK)
        return self._chunks[:full] + ([self._chunks[full][:rest]] if rest else [])

    def project_out(self, vector: Tensor) -> Tensor:
        """Subtract from a vector, in place, its part in the rows' span; the coefficients in float64.

        In blocks of columns, added up in float64: one long sum in float32 would leave 50 times the error.
        """
        found = []
        for chunk in self._views():  # classical Gram-Schmidt within a chunk, modified from chunk to chunk
            part = torch.zeros(len(chunk), dtype=torch.float64, device=self.device)
            for first in range(0, self.dimension, _SUMMED):
                columns = slice(first, first + _SUMMED)
                part += (chunk[:, columns] @ vector[columns]).double()
            vector.addmv_(chunk.T, part.to(vector.dtype), alpha=-1)
            found.append(part)
        return torch.cat(found) if found else vector.new_zeros(0, dtype=torch.float64)

    def combined(self, coefficients: Tensor) -> Tensor:
        """``Vᵀ S`` as ``(n, k)`` for coefficients ``(count, k)``."""
        total = torch.zeros(self.dimension, coefficients.shape[1], dtype=self.dtype, device=self.device)
        start = 0
        for chunk in self._views():
            part = coefficients[start : start + len(chunk)].to(total)
            total.addmm_(chunk.T, part)
            start += len(chunk)
        return total

    def recombine(self, coefficients: Tensor) -> None:
        """Replace the rows by ``Sᵀ V`` for coefficients ``(count, q)``, q ≤ count, without a second copy."""
        chunks = self._views()
        kept = coefficients.shape[1]
        mixing = coefficients.T.to(dtype=self.dtype, device=self.device)
        for first in range(0, self.dimension, COLUMNS):
            columns = slice(first, first + COLUMNS)
            mixed = mixing @ torch.cat([chunk[:, columns] for chunk in chunks])
            for start in range(0, kept, _CHUNK):
                part = mixed[start : start + _CHUNK]
                self._chunks[start // _CHUNK][: len(part), columns] = part
        self.shrink(kept)

    def shrink(self, count: int) -> None:
        """Forget all rows but the first ``count``."""
        self.count = count
        del self._chunks[-(-count // _CHUNK) :]
