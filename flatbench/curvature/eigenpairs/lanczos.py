"""Extreme eigenpairs of a symmetric operator by Lanczos, certified from below and from above."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from flatbench.curvature.eigenpairs.bounds import largest_beside
from flatbench.curvature.eigenpairs.krylov import KrylovBasis, Residuals
from flatbench.curvature.eigenpairs.result import ConvergenceWarning, Eigenpairs, Interrupted
from flatbench.curvature.eigenpairs.ritz import Which
from flatbench.curvature.eigenpairs.room import folder, rows_for
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.errors import InputError

log = logging.getLogger(__name__)

#: seconds between two lines of a long search's log
TELL_SECONDS = 60.0
#: probability with which all upper bounds of a search hold
CONFIDENCE = 0.99
#: a value whose error by rounding is larger than this share of it has not one correct digit
_ONE_DIGIT = 0.1
#: a tolerance of so many times the rounding is looked at more closely
_NEAR_ROUNDING = 1e5


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    *,
    tol: float = 1e-3,
    which: Which = "LM",
    certify: bool = True,
    block: int = 1,
    start: Tensor | None = None,
    max_products: int | None = None,
    seed: int = 0,
    scratch: str | Path | None = None,
) -> Eigenpairs:
    """The ``k`` most wanted eigenpairs, by thick-restart block Lanczos with full reorthogonalisation.

    Every value has two bounds. **From below**: the i-th Ritz value never exceeds the i-th eigenvalue
    (Cauchy). **From above**, with probability 99 % for all values together: a random start has a part of at
    least a known size in every eigenvector, and one with a larger eigenvalue would have shown itself
    (`flatbench.curvature.eigenpairs.bounds`). For k > 1 what was found is locked, and a space from a fresh
    random start orthogonal to it bounds what lies beside it; so copies of a repeated eigenvalue are found,
    and the gap that makes an error quadratic in its residual is proved. The search stops when the two bounds
    of every value are within ``tol``, or says that they are not.

    Rounding is added to both: an estimate from the precision and from how far products contradict each other.

    Args:
        operator: symmetric of order n; that it is symmetric is checked on the way, at no price.
        k: how many pairs, ``1 ≤ k ≤ n``.
        tol: relative error allowed of each value.
        which: ``LM`` largest magnitude, ``LA`` largest, ``SA`` smallest.
        certify: go on until the upper bounds are within ``tol``. Otherwise the search stops when the
            residuals are: some eigenvalue lies within each, which need not be the largest, and copies may be
            missing.
        block: vectors per step.
        start: ``(n,)`` or ``(n, m)``: approximate eigenvectors to begin from, such as those of an earlier
            checkpoint. The noise that is mixed in makes the bound hold here too, about one product later.
        max_products: limit; ``20·k + 200`` if None.
        seed: of the random starts; the global random state is not touched.
        scratch: a folder for the vectors of the search where the operator's memory does not hold enough of
            them; a file without a name in it, gone when the search ends.

    Raises:
        InputError: k is not between 1 and n, another option means nothing, the operator is not symmetric,
            there is no room for a basis, or ``scratch`` is no folder.
        FlatbenchError: a product is not finite.
        Interrupted: Ctrl-C; holds what had converged.

    A search that takes longer than a minute logs every minute how far it is.

    Warns ConvergenceWarning if the search ended before all values were certified, or converged without
    ``certify``; the result says so too.
    """
    n = operator.dimension
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        raise InputError(f"k: {k} eigenvalues wanted of a {n}-dimensional space")
    _check_options(tol, which, block, start, max_products, seed)
    begun, before = time.perf_counter(), operator.products
    with operator:
        longest, rows = rows_for(operator, k, block, None if scratch is None else folder(scratch))
        basis = KrylovBasis(operator, longest, block, seed, rows)
        search = _Search(
            basis,
            _Options(k, tol, which, certify, block),
            20 * k + 200 if max_products is None else max_products,
        )

        def counted(found: Eigenpairs) -> Eigenpairs:
            return replace(found, products=operator.products - before, seconds=time.perf_counter() - begun)

        try:
            basis.begin(start, search.probability())
            search.run()
            found = counted(search.result())
        except KeyboardInterrupt as error:
            raise Interrupted(counted(search.result(only_converged=True))) from error
    good = found.certified if certify else found.converged
    if len(good) < k or not all(good):
        warnings.warn(_complaint(found, good, k, tol, certify), ConvergenceWarning, stacklevel=2)
    return found


def _check_options(
    tol: float, which: str, block: int, start: Any, max_products: int | None, seed: int
) -> None:
    """Raise InputError for options of `top_eigenpairs` that mean nothing, before any product is made."""
    if which not in get_args(Which):
        raise InputError(f"which: '{which}' is none of {', '.join(get_args(Which))}")
    if not (math.isfinite(tol) and tol > 0):
        raise InputError(f"tol: {tol} is no relative error; it is above 0")
    for name, value in (("block", block), ("max_products", max_products)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name}: {value} is no number of 1 or more")
    if start is not None and not isinstance(start, Tensor):
        raise InputError(f"start: a {type(start).__name__}; give a tensor (n,) or (n, m)")
    if not -(2**63) <= seed < 2**64:
        raise InputError(f"seed: {seed} does not fit into 64 bits")


def _complaint(found: Eigenpairs, good: Sequence[bool], k: int, tol: float, certify: bool) -> str:
    failed, count = k - sum(good), k
    if not good:
        return f"no eigenvalue was found within {found.products} products; allow more (max_products)"
    if len(good) < k:
        return (
            f"{k} eigenvalues were wanted, and {len(good)} were found within {found.products} products, "
            f"{sum(good)} of them to a relative error of {tol:g}; allow more (max_products)"
        )
    what = "could not be certified to" if certify and all(found.converged) else "did not reach"
    return (
        f"{failed} of {count} eigenvalues {what} a relative error of {tol:g} within {found.products} "
        f"products; allow more, a larger tol, or a higher precision"
    )


@dataclass(frozen=True)
class _Options:
    """See `top_eigenpairs`."""

    k: int
    tol: float
    which: Which
    certify: bool
    block: int


class _Search:
    """The state of one search: a basis that grows until the wanted values are certified.

    The first space bounds the largest eigenvalue from above. With more values wanted, what was found is
    locked, and a space from a fresh random block bounds what lies beside it: the search for copies of a
    repeated eigenvalue and the proof of the gap in one.
    """

    def __init__(self, basis: KrylovBasis, options: _Options, limit: int) -> None:
        self.basis, self.options, self.limit = basis, options, limit
        self.k, self.which = options.k, options.which
        self.ritz = basis.ritz(self.which)
        self.bounds = [math.inf] * self.k  # on how much each can be wanted
        self._phases = 1
        self._blur = 0.0  # how near to a value rounding lets a bound come, once it is that near
        self._share = 1.0  # of the tolerance, for what residuals add to the values that are locked
        self._begun = self._told = time.monotonic()

    def probability(self) -> float:
        """With which the space that begins now may miss an eigenvector; together they stay within ε."""
        ends = 2 if self.which == "LM" else 1
        # one value is certified by the first space, more by those after it
        first = 0.9 if self.k == 1 else 0.1
        share = first if self._phases == 1 else (1 - first) / 2.0 ** (self._phases - 1)
        return (1 - CONFIDENCE) * share / ends

    def run(self) -> None:
        """Grow the basis until the wanted values are certified, or the limit is met."""
        while not self._may_stop() and self.basis.spent < self.limit and not self.basis.complete:
            self._leave_space()
            self._step()
            if time.monotonic() - self._told >= TELL_SECONDS:
                self._told = time.monotonic()
                log.info(self.progress())

    def progress(self) -> str:
        """How far the search is, in a line: products, time, and the k-th value with what is known of it."""
        line = f"eigenvalues: {self.basis.spent} products in {(time.monotonic() - self._begun) / 60:.1f} min"
        if len(self.ritz.values) < self.k:
            return line
        last = self.k - 1
        line += f"; number {self.k} of {self.k} is {self.ritz.values[last]:.4g}"
        line += f", residual {self.ritz.residuals[last]:.1g}"
        if not self.options.certify:
            return line
        worst = max(bound - self.ritz.key(i) for i, bound in enumerate(self.bounds))
        return line + (
            f", bounds {worst:.1g} beyond the values" if math.isfinite(worst) else ", no bounds yet"
        )

    def _step(self) -> None:
        basis = self.basis
        if basis.full:
            basis.restart(self.which, max(self.k + 1, (self.k + basis.longest - basis.phase.locked) // 2))
        basis.grow()
        self.ritz = basis.ritz(self.which)
        if len(self.ritz.values) >= self.k:
            smallest = self.options.tol * abs(self.ritz.values[self.k - 1])
            looked_at = smallest < _NEAR_ROUNDING * self.ritz.rounding
            self._blur = max(map(basis.resolution, self._ends())) if looked_at else 0.0
            self.bounds = self._best(self._bounds_now())
            if any(bound < self.ritz.key(i) for i, bound in enumerate(self.bounds)):
                # one start in a hundred hides an eigenvector, and this one was found out
                self.bounds = [math.inf] * self.k
                basis.phase.least = None

    # -- bounds -------------------------------------------------------------------------------------------

    def _ends(self) -> tuple[int, ...]:
        return {"LA": (1,), "SA": (-1,), "LM": (1, -1)}[self.which]

    def _bounds_now(self, floor: bool = False, exact: bool = False) -> list[float]:
        """Upper bounds of how much each of k can be wanted, from the space as it is.

        Args:
            floor: the least that they can become in this space, instead.
            exact: as if the locked vectors had no residuals.
        """
        phase, scale = self.basis.phase, self.basis.scale
        residuals = phase.residuals[:0] if exact else phase.residuals
        found = self._most_wanted(
            scale * phase.matrix, scale * residuals, lambda sign: self.basis.rest_bound(sign, floor=floor)
        )
        return [bound + self.ritz.rounding for bound in found]

    def _most_wanted(self, matrix: Tensor, residuals: Tensor, rest: Callable[[int], float]) -> list[float]:
        """How much each of k can be wanted, by `largest_beside` at the wanted ends of the spectrum."""
        found: list[float] = []
        for sign in self._ends():
            found += largest_beside(sign * matrix, residuals, rest(sign), self.k)
        return sorted(found, reverse=True)[: self.k]

    def _tolerance(self, i: int) -> float:
        """Error within which a value is good enough to stop: what is wanted, or what rounding does to it."""
        return max(self.options.tol * abs(self.ritz.values[i]), 3 * self.ritz.rounding)

    def _within(self, bounds: Sequence[float]) -> bool:
        return all(bounds[i] <= self.ritz.key(i) + self._tolerance(i) for i in range(self.k))

    def _may_stop(self) -> bool:
        if len(self.ritz.values) < self.k:
            return False
        near = all(self.ritz.residuals[i] <= self._tolerance(i) for i in range(self.k))
        if not self.options.certify:
            return near
        # where rounding stands between the bounds, no further step helps
        return self._within(self.bounds) or (
            near and self._within([bound - 2 * self._blur for bound in self.bounds])
        )

    # -- spaces -------------------------------------------------------------------------------------------

    def _leave_space(self) -> None:
        """Go on in another space, if this one cannot certify what was found."""
        if not self.options.certify or len(self.ritz.values) < self.k:
            return
        if self._within(self._best(self._bounds_now(floor=True))):
            return
        if self._ready("all"):
            phase = self.basis.phase
            if phase.locked and self._within(self._best(self._bounds_now(floor=True, exact=True))):
                # the residuals of what was locked are too large beside the gap that was proved
                self._share /= 8
                self.basis.refine()
            else:
                self._phases += 1
                self.basis.begin_phase(
                    self.ritz, self._to_lock(), self.k, self.options.block, self.probability()
                )
                self.ritz = self.basis.ritz(self.which)
        elif self._ready("newest") and not self._ready("loose"):
            self.basis.refine()

    def _to_lock(self) -> list[int]:
        """The wanted Ritz pairs, and whatever else is nearly an eigenpair."""
        ritz, enough = self.ritz, self._share * self._tolerance(self.k - 1) / 2
        return [i for i, r in enumerate(ritz.residuals) if i < self.k or r <= enough]

    def _ready(self, residuals: Residuals) -> bool:
        """Whether what is to be locked could be certified beside a rest like the best value that is not."""
        kept = self._to_lock()
        left = [value for i, value in enumerate(self.ritz.values) if i not in set(kept)]
        bounds = self._most_wanted(
            *self.basis.among(self.ritz, kept, residuals),
            lambda sign: max((sign * value for value in left), default=0.0),
        )
        return all(bounds[i] <= self.ritz.key(i) + self._share * self._tolerance(i) for i in range(self.k))

    def _best(self, bounds: Sequence[float]) -> list[float]:
        return [min(pair) for pair in zip(self.bounds, bounds, strict=True)]

    # -- what was found -----------------------------------------------------------------------------------

    def result(self, only_converged: bool = False) -> Eigenpairs:
        """What was found, most wanted first; products and time are not filled in."""
        ritz, tol = self.ritz, self.options.tol
        count = min(self.k, len(ritz.values))
        if self.basis.complete:
            self.bounds = [ritz.key(i) + ritz.rounding for i in range(count)]
        # an eigenvalue's error from above and from below, rounding included in both
        above = [max(self.bounds[i] - ritz.key(i), 0.0) for i in range(count)]
        errors, converged, certified = [], [], []
        for i in range(count):
            wanted = tol * abs(ritz.values[i])
            resolved = 2 * ritz.rounding <= _ONE_DIGIT * abs(ritz.values[i])
            bounded = self.options.certify and math.isfinite(above[i])
            errors.append(max(above[i], ritz.rounding) if bounded else ritz.residuals[i] + ritz.rounding)
            certified.append(self.options.certify and above[i] <= wanted and ritz.rounding <= wanted)
            near = min(ritz.residuals[i], above[i] if bounded else math.inf)
            converged.append(resolved and near <= self._tolerance(i))
        kept = [i for i in range(count) if converged[i] or not only_converged]
        sign = -1.0 if self.which == "SA" else 1.0
        return Eigenpairs(
            values=tuple(ritz.values[i] for i in kept),
            residuals=tuple(ritz.residuals[i] + ritz.rounding for i in kept),
            errors=tuple(errors[i] for i in kept),
            upper_bounds=tuple(sign * self.bounds[i] for i in kept),
            vectors=self.basis.vectors(ritz, kept),
            converged=tuple(converged[i] for i in kept),
            certified=tuple(certified[i] for i in kept),
            settled=tuple(converged[i] for i in kept),
            products=0,
            seconds=0.0,
        )
