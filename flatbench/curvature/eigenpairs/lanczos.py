"""Extreme eigenpairs of a symmetric operator by Lanczos, each with an estimate of its own error."""

from __future__ import annotations

import logging
import time
import warnings
from dataclasses import replace

from torch import Tensor

from flatbench.curvature.eigenpairs.convergence import Convergence, Stop
from flatbench.curvature.eigenpairs.krylov import KrylovBasis
from flatbench.curvature.eigenpairs.result import ConvergenceWarning, Eigenpairs, Interrupted
from flatbench.curvature.eigenpairs.ritz import Outside, Which
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.memory import readable
from flatbench.errors import InputError

log = logging.getLogger(__name__)

#: a basis longer than this is restarted even where the memory would hold more
LONGEST_BASIS = 300


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    tol: float = 1e-3,
    which: Which = "LM",
    stop: Stop = "error",
    verify: bool = True,
    block: int = 1,
    start: Tensor | None = None,
    max_products: int | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The ``k`` most wanted eigenpairs, by thick-restart block Lanczos with full reorthogonalisation.

    A Rayleigh quotient's error is bounded by its residual r, and where the value is separated from the rest
    of the spectrum by a gap, by r²/gap (Kato 1949, Temple 1928; for clusters Mathias 1998). The gap is
    estimated from the other Ritz values and their residuals, so that the second is an estimate.

    A repeated eigenvalue has one vector only in the Krylov space of a single start. With ``verify``, what
    was found is locked and the search goes on from a new random vector orthogonal to it, until the largest
    value there is known to be less wanted, or replaces what was found. ``block`` vectors at a time find up to
    that many copies at once, for more products in all.

    Args:
        operator: symmetric of order n; that it is symmetric is checked on the way, at no price.
        k: how many pairs, ``1 ≤ k ≤ n``.
        tol: relative error allowed of each value.
        which: ``LM`` largest magnitude, ``LA`` largest, ``SA`` smallest.
        stop: when a value counts as converged: its estimated ``error``, or its ``residual`` (a bound),
            within ``tol · |λ|``.
        verify: guard against repeated eigenvalues; costs the products of about one more eigenvalue.
        block: vectors per step.
        start: ``(n,)`` or ``(n, m)``: approximate eigenvectors to begin from, such as those of an earlier
            checkpoint.
        max_products: limit; ``20·k + 200`` if None.
        seed: of the random start; the global random state is not touched.

    Raises:
        InputError: k is not between 1 and n, the operator is not symmetric, the memory does not hold a basis.
        FlatbenchError: a product is not finite.
        Interrupted: Ctrl-C; holds what had converged.

    Warns ConvergenceWarning if the limit of products ended the search; the result says so too.
    """
    n = operator.dimension
    if not 1 <= k <= n:
        raise InputError(f"k: {k} eigenvalues wanted of a {n}-dimensional space")
    begun, before = time.perf_counter(), operator.products
    with operator:
        basis = KrylovBasis(operator, _longest(operator, k, block), block, seed)
        search = _Search(basis, Convergence(k, tol, stop), which, max_products or 20 * k + 200)

        def counted(found: Eigenpairs) -> Eigenpairs:
            return replace(found, products=operator.products - before, seconds=time.perf_counter() - begun)

        try:
            basis.begin(start)
            search.run()
            found = counted(search.verify() if verify else search.result())
        except KeyboardInterrupt as error:
            raise Interrupted(counted(search.result(only_converged=True))) from error
    if not all(found.converged) or (verify and not found.verified):
        warnings.warn(_complaint(found, verify, tol), ConvergenceWarning, stacklevel=2)
    return found


def _complaint(found: Eigenpairs, verify: bool, tol: float) -> str:
    missing = len(found.converged) - sum(found.converged)
    if missing:
        return (
            f"{missing} of {len(found.converged)} eigenvalues did not reach a relative error of {tol:g} "
            f"within {found.products} products; allow more, or a larger tol"
        )
    return f"the check for repeated eigenvalues did not end within {found.products} products"


def _longest(operator: SymmetricOperator, k: int, block: int) -> int:
    """Basis vectors that the memory holds beside the operator. Raises InputError if they are too few."""
    n, least = operator.dimension, k + 2 * block + 2
    longest = min(LONGEST_BASIS, n)
    if operator.memory is not None and n > least:
        each = n * operator.dtype.itemsize
        room = operator.memory - operator.reserved_memory() - (k + 3) * each  # the vectors that are returned
        fits = int(room // each) - block
        if fits < least:
            needed = operator.reserved_memory() + (least + block + k + 3) * each
            raise InputError(
                f"memory: {readable(operator.memory)} do not hold {least} vectors of length {n} beside the "
                f"graphs; about {readable(needed)} would"
            )
        longest = min(longest, fits)
        log.info("basis of at most %d vectors, %s", longest, readable(longest * each))
    return longest


class _Search:
    """The state of one search: a basis that grows until the wanted Ritz values have converged."""

    def __init__(self, basis: KrylovBasis, convergence: Convergence, which: Which, limit: int) -> None:
        self.basis, self.convergence, self.which, self.limit = basis, convergence, which, limit
        self.k = convergence.k
        self.ritz = basis.ritz(which)

    def run(self) -> None:
        """Grow the basis, restarting when it is full, until all wanted pairs converge or the limit is met."""
        while not self.convergence.done(self.ritz) and self._has_budget():
            self._step()

    def verify(self) -> Eigenpairs:
        """Search on from new random vectors until nothing more wanted turns up; what was found."""
        while self.convergence.done(self.ritz) and not self.basis.complete:
            locked, found = self.ritz, self.result()
            self.basis.begin_anew(locked, self.k)
            outside: Outside = "unknown"
            errors: list[float] = []
            while outside == "unknown" and self._has_budget():
                self._step()
                outside, errors = self.ritz.outside(locked, self.k, self.convergence.tol)
            if outside == "separate":
                return replace(found, errors=tuple(errors), verified=True)
            if outside == "unknown" and not self.basis.complete:
                return found
            # one vector more at a time, so that copies are found together
            current = self.result()
            self.convergence.forget()
            self.basis.begin_over(current.vectors)
            self.ritz = self.basis.ritz(self.which)
            if outside == "close":  # values as close as their errors: residuals alone decide
                self.convergence.stop = "residual"
                self.run()
                return replace(self.result(), verified=self.convergence.done(self.ritz))
            self.run()
        return self.result()

    def _step(self) -> None:
        if self.basis.full:
            basis = self.basis
            keep = max(self.k + 1, (self.k + basis.longest) // 2)
            basis.restart(self.ritz, min(keep, basis.length - basis.block))
        self.basis.grow()
        self.ritz = self.basis.ritz(self.which)
        self.convergence.observe(self.ritz)

    def _has_budget(self) -> bool:
        return self.basis.spent < self.limit and not self.basis.complete

    def result(self, only_converged: bool = False) -> Eigenpairs:
        """What was found, most wanted first; products and time are not filled in."""
        ritz = self.basis.ritz(self.which)
        converged, errors = self.convergence.of_each(ritz), ritz.errors(self.k)
        kept = [i for i, done in enumerate(converged) if done or not only_converged]
        flags = tuple(converged[i] for i in kept)
        return Eigenpairs(
            values=tuple(ritz.values[i] for i in kept),
            residuals=tuple(ritz.residuals[i] for i in kept),
            errors=tuple(errors[i] for i in kept),
            vectors=self.basis.vectors(ritz, kept),
            converged=flags,
            settled=flags,
            products=0,
            seconds=0.0,
            verified=self.basis.complete,
        )
