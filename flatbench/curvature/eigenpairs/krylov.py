"""A growing orthonormal basis of a block Krylov space and the operator's projection onto it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs import starts
from flatbench.curvature.eigenpairs.bounds import Cycle, Phase, largest_visible, least_component
from flatbench.curvature.eigenpairs.products import ScaledProducts
from flatbench.curvature.eigenpairs.ritz import Ritz, Which, most_wanted_first
from flatbench.curvature.eigenpairs.rows import gram_root
from flatbench.curvature.eigenpairs.rows_elsewhere import Stack
from flatbench.curvature.operators.base import SymmetricOperator, random_vectors
from flatbench.sums import dot, length, lengths

#: of what: the next block, the loose ends, or both
Residuals = Literal["newest", "loose", "all"]

#: steps after which a space's largest value shows how large the products of its vectors are
_FIRST_STEPS = 8


class KrylovBasis:
    """``H V = V T + W C + L R``: V orthonormal ``(n, m)``, W the next block ``(n, p)``, C ``(p, m)``.

    T is projected in full, not only where Lanczos has it non-zero. So a thick restart (Wu and Simon 2000) is
    no special case, and T's asymmetry tells an operator that is not symmetric. L ``(n, q)`` are the loose
    ends of spaces that were left for another random start, orthogonal to V and W; R ``(q, m)``.

    All of these are of the scaled products (`ScaledProducts`).

    Args:
        longest: number of vectors that V may hold.
        block: p, vectors per step.
        rows: an empty stack for V and W.

    Attributes:
        spent: products made with the operator by this basis.
        phase: what is known of the random start that the newest vectors came from.
    """

    def __init__(self, operator: SymmetricOperator, longest: int, block: int, seed: int, rows: Stack) -> None:
        self.operator, self.longest, self.block = operator, longest, min(block, operator.dimension)
        self._rows = rows  # V, then W
        self._rayleigh_matrix = torch.zeros(0, 0, dtype=torch.float64)  # T
        self._coupling = torch.zeros(0, 0, dtype=torch.float64)  # C
        self._loose: list[Tensor] = []  # L
        self._loose_coupling = torch.zeros(0, 0, dtype=torch.float64)  # R
        self._loose_root = torch.zeros(0, 0, dtype=torch.float64)  # G with GᵀG = LᵀL
        self._products = ScaledProducts(operator)
        self._generator_seed = seed
        self._known_cycle: tuple[Cycle, Tensor] | None = None  # of the phase as it is
        self.phase = Phase(0, self._rayleigh_matrix, self._coupling, None, range(0))
        self.spent = 0

    # -- what it holds ------------------------------------------------------------------------------------

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

    @property
    def invariant(self) -> bool:
        """Whether V spans an invariant space, so that going on would begin with a new random vector."""
        return self.length > 0 and not bool(self._coupling.any())

    @property
    def scale(self) -> float:
        """What a product is divided by."""
        return self._products.scale

    # -- starts -------------------------------------------------------------------------------------------

    def begin(self, start: Tensor | None, probability: float) -> None:
        """Take the first block: random, or mixtures of the given vectors with a little noise.

        Args:
            probability: with which the start may hide an eigenvector (`least_component`).

        Raises InputError if the start does not fit the operator.
        """
        n = self.operator.dimension
        least = least_component(n, self.block, probability)
        if start is None:
            blocks = self._random(self.block)
        else:
            given = starts.checked(start, self.operator)
            # the given vectors may come from the same stream of random numbers: the noise must not
            self._generator_seed += starts.fingerprint(given)
            blocks = starts.mixed(given, self._random(self.block))
            least = starts.NOISE / (1 + starts.NOISE) * least_component(n, 1, probability)
        self._append(list(blocks.T))
        self._coupling = torch.zeros(self._rows.count, 0, dtype=torch.float64)
        self.phase = self._new_phase(least)

    def begin_at(self, start: Tensor) -> None:
        """Take one vector ``(n,)``, as it is, for the first block."""
        self._append([start.clone()])
        self._coupling = torch.zeros(1, 0, dtype=torch.float64)

    def begin_phase(self, ritz: Ritz, kept: list[int], least: int, block: int, probability: float) -> None:
        """Lock some Ritz vectors and go on from a random block orthogonal to them.

        Args:
            ritz: of the whole basis.
            kept: which of its vectors, most wanted first.
            least: how many of them must stay, even if the memory is short.
            block: vectors per step from now on.
            probability: with which the block may hide an eigenvector.
        """
        self._loosen()
        if self.longest < self.operator.dimension:
            kept = kept[: max(least, self.longest - max(self.longest // 2, 2 * block + 2))]
        self._compress(ritz.coefficients[:, kept], 0)
        rest = self.operator.dimension - self.length
        width = min(block, rest)
        self._append(list(self._random(width).T))
        self._coupling = torch.zeros(self._rows.count - self.length, self.length, dtype=torch.float64)
        self._tie()
        self.phase = self._new_phase(least_component(rest, width, probability))

    def refine(self) -> None:
        """Go on from all loose ends and the next block together, to lower the residuals of what was found."""
        ends, self._loose = self._loose, []
        fresh = self._append(ends) @ self._loose_coupling
        self._coupling = torch.cat([self._coupling, fresh])
        self._loose_coupling = torch.zeros(0, self.length, dtype=torch.float64)
        self._tie()
        self.phase = self._new_phase(None, locked=0)

    def _new_phase(self, least: float | None, locked: int | None = None) -> Phase:
        locked = self.length if locked is None else locked
        self._products.forget_recent()
        self._known_cycle = None
        block, residuals = self._rows.count - self.length, self._residual_rows("all")[:, :locked]
        return Phase(locked, self._rayleigh_matrix[:locked, :locked], residuals, least, range(block))

    def _loosen(self) -> None:
        """Let the next block go, but remember it as loose ends."""
        m = self.length
        for i in range(self._rows.count - m):
            if float(self._coupling[i].norm()) > 0:
                self._loose.append(self._rows[m + i].clone())
                self._loose_coupling = torch.cat([self._loose_coupling, self._coupling[i : i + 1]])
        self._rows.shrink(m)
        self._coupling = torch.zeros(0, m, dtype=torch.float64)

    # -- growing ------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """One step: the products of the next block, and the block after it.

        Raises InputError if the operator turns out not to be symmetric.
        """
        m, p = self.length, self._rows.count - self.length
        products = [self._products.of(self._rows[m + i]) for i in range(p)]
        self.spent += p
        columns = torch.stack([self._projection(product) for product in products], dim=1)
        self._check_symmetric(columns, m)
        grown = torch.zeros(m + p, m + p, dtype=torch.float64)
        grown[:m, :m] = self._rayleigh_matrix
        grown[:, m:] = columns
        grown[m:] = columns.T
        grown[m:, m:] = (columns[m:] + columns[m:].T) / 2
        self._rayleigh_matrix, self._known_cycle = grown, None
        self._loose_coupling = torch.cat(
            [self._loose_coupling, torch.zeros(len(self._loose), p, dtype=torch.float64)], dim=1
        )
        coupling = self._append(products)
        self._coupling = torch.zeros(len(coupling), m + p, dtype=torch.float64)
        self._coupling[:, m:] = coupling
        self._tie()

    def _projection(self, product: Tensor) -> Tensor:
        """Take the basis out of a product, in place; the coefficients ``(m + p,)`` in float64."""
        total = torch.zeros(self._rows.count, dtype=torch.float64)
        before = length(product)
        for _ in range(4):
            total += self._rows.project_out(product).cpu()
            after = length(product)
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
        tiny = 20 * torch.finfo(self.operator.dtype).eps * self._products.norm
        for j, vector in enumerate(vectors):
            inside = self._projection(vector)[first:]
            coupling[: len(inside), j] = inside
            size = length(vector)
            place = self._rows.count - first
            if size > tiny and place < room:
                coupling[place, j] = size
            elif place < room:
                vector = self._random(1)[:, 0]
                self._projection(vector)
                size = length(vector)
            else:
                continue
            self._rows.append(vector / size)
        return coupling

    def _tie(self) -> None:
        """Take the next block out of the loose ends; their part in it couples it to what they belong to."""
        for i in range(self._rows.count - self.length):
            row = self._rows[self.length + i]
            for j, end in enumerate(self._loose):
                part = dot(row, end)
                end.sub_(row, alpha=part)
                self._coupling[i].add_(self._loose_coupling[j], alpha=part)
        self._loose_root = gram_root(self._loose)

    def _random(self, count: int) -> Tensor:
        self._generator_seed += 1
        return random_vectors(self.operator, count, self._generator_seed)

    def _check_symmetric(self, columns: Tensor, m: int) -> None:
        """Compare ``Vᵀ H W``, computed now, with ``Cᵀ``, known before."""
        difference = (columns[m:] - columns[m:].T).abs().max()
        if m:
            difference = torch.maximum(difference, (columns[:m] - self._coupling.T).norm(dim=0).max())
        self._products.compare(float(difference))

    # -- what it says -------------------------------------------------------------------------------------

    def ritz(self, which: Which) -> Ritz:
        """The eigenpairs of T, most wanted first."""
        if not self.length:
            return Ritz([], [], self._rayleigh_matrix, which, 0.0)
        values, coefficients = torch.linalg.eigh(self._rayleigh_matrix)
        order = most_wanted_first(values.tolist(), which)
        coefficients = coefficients[:, order]
        residuals = (self._residual_rows("all") @ coefficients).norm(dim=0)
        if self.complete:
            residuals.zero_()
        return Ritz(
            (values[order] * self.scale).tolist(),
            (residuals * self.scale).tolist(),
            coefficients,
            which,
            self._products.error(float(values.abs().max())) * self.scale,
        )

    def _residual_rows(self, residuals: Residuals) -> Tensor:
        """Rows ``(q, m)`` whose products with coefficients are as long as the residuals or a part of them."""
        newest, loose = self._coupling, self._loose_root @ self._loose_coupling
        return {"newest": newest, "loose": loose, "all": torch.cat([newest, loose])}[residuals]

    def among(self, ritz: Ritz, kept: list[int], residuals: Residuals) -> tuple[Tensor, Tensor]:
        """T among some Ritz vectors, and rows R with ``‖R s‖`` the residual of a combination s of them."""
        values = torch.tensor([ritz.values[i] for i in kept], dtype=torch.float64)
        return torch.diag(values), self._residual_rows(residuals) @ ritz.coefficients[:, kept] * self.scale

    def rest_bound(self, sign: int, floor: bool = False) -> float:
        """Upper bound of ``sign·H`` on the complement of the locked vectors, up to rounding.

        Args:
            sign: 1 or -1.
            floor: the least that the bound can fall to from here, instead.

        Returns:
            It holds with the probability that the phase was begun with; infinite if it was not begun at
            random.
        """
        first = self.phase.locked
        if self.phase.least is None or (self.length == first and not floor):
            return math.inf
        if self.length == first:
            return -math.inf
        cycles = self._cycles(sign)
        if floor or self.complete:
            return float(cycles[-1].values.max()) * self.scale
        return largest_visible(cycles, self.phase.least, self._blur(cycles[-1])) * self.scale

    def resolution(self, sign: int) -> float:
        """How near to a space's largest value rounding lets a bound come, once it is near; 0 before.

        Args:
            sign: 1 or -1: of ``sign·H``.
        """
        steps = self.length - self.phase.locked
        if self.phase.least is None or steps == 0 or self.complete:
            return 0.0
        cycles = self._cycles(sign)
        if steps < _FIRST_STEPS and bool(cycles[-1].coupling.any()):
            return 0.0  # its values have not grown to what they will be
        noise, top = self._blur(cycles[-1]), float(cycles[-1].values.max())
        alone = replace(cycles[-1], coupling=torch.zeros_like(cycles[-1].coupling))
        least = largest_visible([alone], self.phase.least, noise)
        reached = largest_visible(cycles, self.phase.least, noise)
        return (least - top) * self.scale if reached - top <= 2 * (least - top) else 0.0

    def _blur(self, cycle: Cycle) -> float:
        return self._products.error_in_a_direction(float(cycle.values.abs().max()))

    def _cycles(self, sign: int) -> list[Cycle]:
        """The phase's spaces, of ``sign·H``: those before its restarts, and as it is."""
        every = [*self.phase.cycles, self._cycle()[0]]
        return [replace(cycle, values=sign * cycle.values) for cycle in every]

    def _cycle(self) -> tuple[Cycle, Tensor]:
        """The phase as it is, and the coefficients of its Ritz vectors."""
        if self._known_cycle is None:
            first = self.phase.locked
            values, coefficients = torch.linalg.eigh(self._rayleigh_matrix[first:, first:])
            start = coefficients[self.phase.start.start : self.phase.start.stop]
            coupling = (self._coupling[:, first:] @ coefficients).T
            self._known_cycle = Cycle(values, start, coupling), coefficients
        return self._known_cycle

    # -- restarts -----------------------------------------------------------------------------------------

    def restart(self, which: Which, keep: int) -> None:
        """Thick restart: the ``keep`` most wanted Ritz vectors of the phase stay, and the next block."""
        first, block = self.phase.locked, self._rows.count - self.length
        cycle, coefficients = self._cycle()
        keep = max(1, min(keep, len(cycle.values) - block))
        if self.phase.least is not None:
            self.phase.cycles.append(cycle)
            self.phase.start = range(keep, keep + block)
        order = most_wanted_first(cycle.values.tolist(), which)
        self._untie(coefficients[:, order[keep:]])
        next_block = [self._rows[i].clone() for i in range(self.length, self._rows.count)]
        self._compress(coefficients[:, order[:keep]], first)
        for row in next_block:
            self._rows.append(row)
        self._loose_root = gram_root(self._loose)

    def _untie(self, dropped: Tensor) -> None:
        """Give back to the loose ends the part that lies in vectors which are dropped.

        T couples these to the locked vectors through the loose ends alone, ``T_dropped,locked = P C``.

        Args:
            dropped: their coefficients in the phase's vectors.
        """
        first = self.phase.locked
        if not self._loose:
            return
        lost = dropped.T @ self._rayleigh_matrix[first:, :first]
        parts = torch.zeros(self._rows.count, len(self._loose), dtype=torch.float64)
        parts[first : self.length] = dropped @ lost @ torch.linalg.pinv(self._loose_coupling[:, :first])
        for end, part in zip(self._loose, self._rows.combined(parts).T, strict=True):
            end.add_(part)

    def _compress(self, chosen: Tensor, first: int) -> None:
        """Replace the vectors from ``first`` on by their combinations ``chosen``."""
        m = self.length
        whole = torch.zeros(m, first + chosen.shape[1], dtype=torch.float64)
        whole[:first, :first] = torch.eye(first, dtype=torch.float64)
        whole[first:, first:] = chosen
        self._rows.shrink(m)
        self._rows.recombine(whole)
        self._known_cycle = None
        self._rayleigh_matrix = whole.T @ self._rayleigh_matrix @ whole
        self._coupling = self._coupling @ whole
        self._loose_coupling = self._loose_coupling @ whole

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
        return found.div_(lengths(found))
