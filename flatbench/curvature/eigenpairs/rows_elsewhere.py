"""A growing stack of long vectors that are kept where there is more room than beside the graphs.

That is the host's memory for an accelerator, and a file for a CPU. Each pass over the stack reads one vector
after the other, so that one of them at a time is in the memory that graphs are in.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.rows import COLUMNS, Rows
from flatbench.errors import InputError
from flatbench.sums import dot


class Store(Protocol):
    """Vectors of one length on the host, by number."""

    def read(self, index: int, columns: slice) -> Tensor:
        """Some columns of a vector, on the CPU; valid until the next is read."""

    def write(self, index: int, first: int, part: Tensor) -> None:
        """Some columns of a vector, from ``first`` on."""

    def shrink(self, count: int) -> None:
        """Forget all vectors but the first ``count``."""


class HostStore:
    """In the host's memory.

    Args:
        dimension: length of a vector.
    """

    def __init__(self, dimension: int, dtype: torch.dtype) -> None:
        self._dimension, self._dtype = dimension, dtype
        self._rows: list[Tensor] = []

    def read(self, index: int, columns: slice) -> Tensor:
        """Some columns of a vector."""
        return self._rows[index][columns]

    def write(self, index: int, first: int, part: Tensor) -> None:
        """Some columns of a vector, from ``first`` on."""
        if index == len(self._rows):
            self._rows.append(torch.empty(self._dimension, dtype=self._dtype))
        self._rows[index][first : first + len(part)] = part

    def shrink(self, count: int) -> None:
        """Forget all vectors but the first ``count``."""
        del self._rows[count:]


class FileStore:
    """In a file without a name, which is gone when the process is, whatever ends it.

    Args:
        folder: of the file; must exist.
        dimension: length of a vector.

    Raises InputError where the folder takes no file, or is full.
    """

    def __init__(self, folder: Path, dimension: int, dtype: torch.dtype) -> None:
        self._folder, self._dimension = folder, dimension
        self._buffer = torch.empty(dimension, dtype=dtype)
        with self._understood():
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed with the store

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"scratch: {self._folder}: {error.strerror or error}") from error

    def _place(self, index: int, first: int) -> int:
        return (index * self._dimension + first) * self._buffer.itemsize

    def read(self, index: int, columns: slice) -> Tensor:
        """Some columns of a vector, in a buffer of which there is one."""
        first, last, _ = columns.indices(self._dimension)
        part = self._buffer[: last - first]
        left, place = part.numpy().data.cast("B"), self._place(index, first)
        with self._understood():
            while left:
                count = os.preadv(self._file.fileno(), [left], place)
                if not count:
                    raise OSError("the file of vectors was cut")
                left, place = left[count:], place + count
        return part

    def write(self, index: int, first: int, part: Tensor) -> None:
        """Some columns of a vector, from ``first`` on."""
        left = part.contiguous().numpy().data.cast("B")
        place = self._place(index, first)
        with self._understood():
            while left:
                count = os.pwrite(self._file.fileno(), left, place)
                left, place = left[count:], place + count

    def shrink(self, count: int) -> None:
        """Forget all vectors but the first ``count``."""
        with self._understood():
            self._file.truncate(self._place(count, 0))


class RowsElsewhere:
    """Vectors ``(n,)`` as the rows of a stack, as `flatbench.curvature.eigenpairs.rows.Rows`.

    Args:
        store: where they are.
        dimension: n.
        device: of the vectors that are given and taken.
    """

    def __init__(self, store: Store, dimension: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dimension, self.dtype, self.device = dimension, dtype, device
        self._store = store
        self.count = 0

    def append(self, vector: Tensor) -> None:
        """Add a vector at the end."""
        self._store.write(self.count, 0, vector.cpu())
        self.count += 1

    def __getitem__(self, index: int) -> Tensor:
        return self._read(index).clone()

    def _read(self, index: int) -> Tensor:
        """A vector on the device; valid until the next is read."""
        return self._store.read(index, slice(None)).to(self.device)

    def project_out(self, vector: Tensor) -> Tensor:
        """Subtract from a vector, in place, its part in the rows' span; the coefficients in float64.

        Modified Gram-Schmidt, which reads every row once.
        """
        found = []
        for i in range(self.count):
            row = self._read(i)
            found.append(dot(row, vector))
            vector.sub_(row, alpha=found[-1])
        return torch.tensor(found, dtype=torch.float64)

    def combined(self, coefficients: Tensor) -> Tensor:
        """``Vᵀ S`` as ``(n, k)`` for coefficients ``(count, k)``."""
        total = torch.zeros(self.dimension, coefficients.shape[1], dtype=self.dtype, device=self.device)
        for i, part in enumerate(coefficients):
            if part.any():
                total.addr_(self._read(i), part.to(total))
        return total

    def recombine(self, coefficients: Tensor) -> None:
        """Replace the rows by ``Sᵀ V`` for coefficients ``(count, q)``, q ≤ count, some columns at a time."""
        mixing = coefficients.T.to(dtype=self.dtype, device="cpu")
        for first in range(0, self.dimension, COLUMNS):
            columns = slice(first, first + COLUMNS)
            together = torch.stack([self._store.read(i, columns).clone() for i in range(self.count)])
            for i, part in enumerate(mixing @ together):
                self._store.write(i, first, part)
        self.shrink(coefficients.shape[1])

    def shrink(self, count: int) -> None:
        """Forget all rows but the first ``count``."""
        self.count = count
        self._store.shrink(count)


#: a stack, wherever its vectors are
Stack = Rows | RowsElsewhere
