"""A growing orthonormal basis of a block Krylov space and the operator's projection onto it."""

from __future__ import annotations

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.ritz import Ritz, Which, wanted_key
from flatbench.curvature.eigenpairs.rows import Rows
from flatbench.curvature.operators.base import SymmetricOperator, random_vectors, symmetry_tolerance
from flatbench.errors import InputError

#: products that contradict each other by this many times what rounding usually leaves are no rounding
_HARDLY_ROUNDING = 20


class KrylovBasis:
    """``H V = V T + W C``: V orthonormal ``(n, m)``, W the next block ``(n, p)``, C ``(p, m)``.

    T is projected in full, not only where Lanczos has it non-zero. So a thick restart (Wu and Simon 2000) is
    no special case, and T's asymmetry tells an operator that is not symmetric.

    Args:
        longest: number of vectors that V may hold.
        block: p, vectors per step.

    Attributes:
        spent: products made with the operator by this basis.
    """

    def __init__(self, operator: SymmetricOperator, longest: int, block: int, seed: int) -> None:
        self.operator, self.longest, self.block = operator, longest, min(block, operator.dimension)
        self._rows = Rows(operator.dimension, operator.dtype, operator.device)  # V, then W
        self._rayleigh_matrix = torch.zeros(0, 0, dtype=torch.float64)  # T
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)  # C
        # residuals that a fresh start let go of, a row of V
        self._restart_residuals = torch.zeros(0, dtype=torch.float64)
        self._norm = 0.0  # a lower bound of ‖H‖
        self._asymmetry = 0.0  # relative to it, where it is more than rounding usually leaves
        self._generator_seed = seed
        self.spent = 0

    @property
    def length(self) -> int:
        """m, the vectors whose products are known."""
        return len(self._rayleigh_matrix)

    @property
    def full(self) -> bool:
        """Whether another step would make the basis too long."""
        return self._rows.count > self.longest and not self.complete

    @property
    def complete(self) -> bool:
        """Whether V spans the whole space, so that T has all eigenvalues of H."""
        return self.length == self.operator.dimension

    def begin(self, start: Tensor | None) -> None:
        """Take the first block: random, or mixtures of the given vectors with a little noise.

        Raises InputError if the start does not fit the operator.
        """
        blocks = self._random(self.block)
        if start is not None:
            given = start.reshape(len(start), -1).to(blocks)
            if len(given) != self.operator.dimension or not bool(torch.isfinite(given).all()):
                raise InputError(
                    f"start: needs finite vectors of length {self.operator.dimension}, "
                    f"not {tuple(start.shape)}"
                )
            mixed = torch.stack([given[:, i :: self.block].sum(dim=1) for i in range(self.block)], dim=1)
            # what the given vectors lack must stay within reach
            blocks = mixed + blocks * (0.1 * mixed.norm(dim=0) / blocks.norm(dim=0))
        self._append(list(blocks.T))

    def begin_at(self, start: Tensor) -> None:
        """Take one vector ``(n,)``, as it is, for the first block."""
        self._append([start.clone()])

    @property
    def invariant(self) -> bool:
        """Whether V spans an invariant space, so that going on would begin with a new random vector."""
        return self.length > 0 and not bool(self._coupling.any())

    def grow(self) -> None:
        """One step: the products of the next block, and the block after it.

        Raises InputError if the operator turns out not to be symmetric.
        """
        m, p = self.length, self._rows.count - self.length
        products = [self.operator @ self._rows[m + i] for i in range(p)]
        self.spent += p
        self._norm = max(self._norm, *(float(product.norm()) for product in products))
        columns = torch.stack([self._projection(product) for product in products], dim=1)
        self._check_symmetric(columns, m)
        grown = torch.zeros(m + p, m + p, dtype=torch.float64)
        grown[:m, :m] = self._rayleigh_matrix
        grown[:, m:] = columns
        grown[m:] = columns.T
        grown[m:, m:] = (columns[m:] + columns[m:].T) / 2
        self._rayleigh_matrix = grown
        self._restart_residuals = torch.cat([self._restart_residuals, torch.zeros(p, dtype=torch.float64)])
        coupling = self._append(products)
        self._coupling = torch.zeros(len(coupling), m + p, dtype=torch.float64)
        self._coupling[:, m:] = coupling

    def _projection(self, product: Tensor) -> Tensor:
        """Take the basis out of a product, in place; the coefficients ``(m + p,)`` in float64."""
        total = torch.zeros(self._rows.count, dtype=torch.float64)
        before = float(product.norm())
        for _ in range(4):
            total += self._rows.project_out(product).double().cpu()
            after = float(product.norm())
            if after > 0.7 * before:  # orthogonal to working precision ("twice is enough")
                break
            before = after
        return total

    def _append(self, vectors: list[Tensor]) -> Tensor:
        """Make vectors orthonormal and add them as the next block; ``(p, len(vectors))`` coefficients.

        A vector that vanishes (an invariant space was found) is replaced by a random one with coefficients
        zero; only as many are added as the space has room for.
        """
        first = self._rows.count
        room = min(len(vectors), self.operator.dimension - first)
        coupling = torch.zeros(room, len(vectors), dtype=torch.float64)
        tiny = 20 * torch.finfo(self.operator.dtype).eps * self._norm
        for j, vector in enumerate(vectors):
            inside = self._projection(vector)[first:]
            coupling[: len(inside), j] = inside
            length = float(vector.norm())
            place = self._rows.count - first
            if length > tiny and place < room:
                coupling[place, j] = length
            elif place < room:
                vector = self._random(1)[:, 0]
                self._projection(vector)
                length = float(vector.norm())
            else:
                continue
            self._rows.append(vector / length)
        return coupling

    def _random(self, count: int) -> Tensor:
        self._generator_seed += 1
        return random_vectors(self.operator, count, self._generator_seed)

    def _check_symmetric(self, columns: Tensor, m: int) -> None:
        """Compare ``Vᵀ H W``, computed now, with ``Cᵀ``, known before."""
        difference = (columns[m:] - columns[m:].T).abs().max()
        if m:
            difference = torch.maximum(difference, (columns[:m] - self._coupling.T).norm(dim=0).max())
        beyond = float(difference) - float(self._restart_residuals.norm())
        usual = symmetry_tolerance(self.operator) * self._norm
        if beyond <= usual:
            return
        if beyond > _HARDLY_ROUNDING * usual:
            raise InputError(
                f"the operator is not symmetric: its products contradict each other by "
                f"{float(difference) / self._norm:.1e} of its norm"
            )
        # the products of a large model in single precision: their error is measured, and enters all others
        self._asymmetry = max(self._asymmetry, beyond / self._norm)

    def ritz(self, which: Which) -> Ritz:
        """The eigenpairs of T, most wanted first."""
        eps = float(torch.finfo(self.operator.dtype).eps)
        if not self.length:
            return Ritz([], [], self._rayleigh_matrix, which, 0.0)
        values, coefficients = torch.linalg.eigh(self._rayleigh_matrix)
        keys = [wanted_key(value, which) for value in values.tolist()]
        order = sorted(range(len(keys)), key=lambda i: -keys[i])
        coefficients = coefficients[:, order]
        residuals = (self._coupling @ coefficients).norm(dim=0) + self._restart_residuals @ coefficients.abs()
        if self.complete:
            residuals.zero_()
        size = max(self._norm, float(values.abs().max()))
        noise = size * (32 * eps + self.operator.relative_error + self._asymmetry)
        return Ritz(values[order].tolist(), residuals.tolist(), coefficients, which, noise)

    def restart(self, ritz: Ritz, keep: int) -> None:
        """Thick restart: only the ``keep`` most wanted Ritz vectors stay, and the next block."""
        block = [self._rows[i].clone() for i in range(self.length, self._rows.count)]
        self._compress(ritz, keep)
        for row in block:
            self._rows.append(row)

    def begin_anew(self, ritz: Ritz, keep: int) -> None:
        """Lock the ``keep`` most wanted Ritz vectors and go on from a random block orthogonal to them."""
        self._compress(ritz, keep)
        self._restart_residuals = torch.tensor(ritz.residuals[:keep], dtype=torch.float64)
        count = min(self.block, self.operator.dimension - keep)
        self._append(list(self._random(count).T))
        self._coupling = torch.zeros(count, keep, dtype=torch.float64)

    def begin_over(self, start: Tensor) -> None:
        """Forget the basis and begin from a mixture of given vectors and random ones, with a wider block."""
        self.block = min(self.block + 1, self.operator.dimension)
        self._rows.shrink(0)
        self._rayleigh_matrix, self._restart_residuals = (
            self._rayleigh_matrix[:0, :0],
            self._restart_residuals[:0],
        )
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)
        self._append([*start.sum(dim=1, keepdim=True).T, *self._random(self.block - 1).T])

    def _compress(self, ritz: Ritz, keep: int) -> None:
        chosen = ritz.coefficients[:, :keep]
        self._rows.shrink(self.length)
        self._rows.recombine(chosen)
        self._rayleigh_matrix = torch.diag(torch.tensor(ritz.values[:keep], dtype=torch.float64))
        self._coupling = self._coupling @ chosen
        self._restart_residuals = self._restart_residuals @ chosen.abs()

    def vectors(self, ritz: Ritz, which: list[int]) -> Tensor:
        """Ritz vectors ``(n, len(which))``, unit length."""
        if not which:
            return torch.zeros(
                self.operator.dimension, 0, dtype=self.operator.dtype, device=self.operator.device
            )
        count = self._rows.count
        padded = torch.zeros(count, len(which), dtype=torch.float64)
        padded[: self.length] = ritz.coefficients[:, which]
        found = self._rows.combined(padded)
        return found / found.norm(dim=0)
