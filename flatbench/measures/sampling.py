"""The error that the data make: what a value measured on some of the examples says about all of them.

A value of the mean loss over m of N examples is compared with that over all N. The sample is split into
groups; the spread of the value with one group left out (jackknife), or of its part in each group, gives half
a 95 % interval by Student's t. What was fitted to the sample (an eigenvector, a worst perturbation) lifts the
value by about c/m; that lift is estimated and added, so that the interval holds on both sides. Both close as
m nears N. No sample reveals an example outside of it that is unlike all within.

A sample that is taken because its interval is narrow has, more often than others, an interval that is too
narrow by chance. So a value is called resolved only by the first sample that would still be narrow enough if
the spread were at the upper end of what its groups leave open, and by none that is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import mul
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from flatbench.curvature.estimates.probes import probes, student
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.batches import chosen
from flatbench.seeding import derive_seed
from flatbench.subject.objective import Objective, first_examples, rows
from flatbench.subject.spaces import Point
from flatbench.subject.subject import Subject

Batches = Sequence[Mapping[str, Tensor]]

#: groups of examples whose values are compared, and how many examples each has at least
GROUPS, LEAST = 16, 4
#: examples to begin with, and by how much the sample may grow at once; no smaller sample resolves a value
FIRST, FACTOR = 128, 8
#: the upper end of a one-sided 95 % interval for a standard deviation that G = `GROUPS` values gave, relative
#: to it: √((G − 1)/χ²), with χ² the 5 % quantile at G − 1 degrees of freedom
CAUTION = 1.437
#: sampling error allowed of a value, relative to it, and gradients of single examples that it may cost
INTERVAL, BUDGET = 0.2, 100_000
#: gradients that a product with the Hessian costs, and passes forward that a gradient costs
PRODUCT, FORWARD = 2, 3
#: random vectors from which the trace's spread over examples is told
TRACE_PROBES = 8


# -- how many examples ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How many examples a measure takes.

    Attributes:
        examples: the first that many; None for as many as ``interval`` asks for.
        interval: the sampling error wanted, relative to every value; None for all examples.
        budget: of gradients of single examples, for the growing.
        first: examples to begin with.
    """

    examples: int | None
    interval: float | None
    budget: int
    first: int = FIRST


@dataclass(frozen=True)
class Taken:
    """A measurement on a sample.

    Attributes:
        entries: of the result.
        values: what is to be resolved.
        errors: the sampling error of each, absolute; infinite where it is unknown.
        gradients: of single examples, that it cost.
        rounding: the error of each by rounding, absolute; empty where it is not known.
    """

    entries: dict[str, Any]
    values: Sequence[float]
    errors: Sequence[float]
    gradients: float
    rounding: Sequence[float] = ()

    @property
    def lost(self) -> bool:
        """Whether rounding hides every value, so that more examples would not help."""
        known = [error for error in self.rounding if math.isfinite(error)]
        return len(known) == len(self.values) and all(map(_is_hidden, self.values, known))

    @property
    def widest(self) -> float:
        """The largest sampling error relative to its value."""
        pairs = zip(self.errors, self.values, strict=True)
        return max((error / abs(value) if value else math.inf) if error else 0.0 for error, value in pairs)


def measured(batches: Batches, sampling: Sampling, take: Callable[[Batches, float], Taken]) -> dict[str, Any]:
    """Measure on as many examples as are asked for, or as it takes until every value is resolved.

    Args:
        take: measures on some batches, which hold this share of all examples.

    Returns:
        The last measurement's entries, with ``examples``, ``example_gradients`` (of all measurements) and
        ``resolved`` (`CAUTION` times every sampling error is within ``interval``, of a sample of at least
        `FIRST` examples, or of all; None if no interval is asked for).
    """
    total, spent = sum(map(rows, batches)), 0.0
    given, wanted = sampling.examples, sampling.interval
    size = total if given is None and wanted is None else min(given or sampling.first, total)
    while True:
        fixed = given is not None or size == total
        sample = first_examples(batches, size) if fixed else drawn(batches, size)
        found = take(sample, size / total)
        spent += found.gradients
        width = CAUTION * found.widest
        resolved = None if wanted is None else width <= wanted and size >= min(FIRST, total)
        if resolved or fixed or found.lost:
            break
        assert wanted is not None
        affordable = size * (sampling.budget - spent) / found.gradients
        following = int(min(_next_size(size, total, width / wanted), FACTOR * size, affordable, total))
        if following <= 1.25 * size:
            break
        size = following
    return {**found.entries, "examples": size, "example_gradients": round(spent), "resolved": resolved}


def _is_hidden(value: float, error: float) -> bool:
    return abs(value) <= error


def _next_size(size: int, total: int, times: float) -> float:
    """Examples at which an error would be ``times`` smaller, and a tenth more; at least twice as many."""
    left = (1 / size - 1 / total) / times**2
    return max(1.1 / (1 / total + left), 2 * size)


def drawn(batches: Batches, size: int) -> list[Mapping[str, Tensor]]:
    """A random sample of so many examples, the same for all data of one length; a larger one holds it.

    Rows of batches of one shape are put together.
    """
    counts = [rows(batch) for batch in batches]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0))
    taken = order[:size].sort().values
    found: dict[Any, list[Mapping[str, Tensor]]] = {}
    offset = 0
    for batch, count in zip(batches, counts, strict=True):
        index = taken[(taken >= offset) & (taken < offset + count)] - offset
        offset += count
        if len(index):
            shape = tuple((key, v.shape[1:] if _by_row(v, count) else None) for key, v in batch.items())
            found.setdefault(shape, []).append(chosen(batch, index))
    joined = []
    for alike in found.values():
        pieces: list[Mapping[str, Tensor]] = []
        for part in alike:
            if pieces and sum(map(rows, pieces)) + rows(part) > max(counts):
                joined.append(_join(pieces))
                pieces = []
            pieces.append(part)
        joined.append(_join(pieces))
    return joined


def _by_row(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == count


def _join(parts: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    first, count = parts[0], rows(parts[0])
    return {k: torch.cat([p[k] for p in parts]) if _by_row(v, count) else v for k, v in first.items()}


# -- how far the value may be off ----------------------------------------------------------------------------


def dealt(batches: Batches, seed: int, count: int | None = None) -> list[list[Mapping[str, Tensor]]]:
    """The examples dealt out at random to groups of about equal size: at most `GROUPS`, or ``count``."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "groups") % 2**62)
    total = sum(map(rows, batches))
    if count is None:
        count = max(min(GROUPS, total // LEAST), 1)
    found: list[list[Mapping[str, Tensor]]] = [[] for _ in range(count)]
    offset = 0
    for batch in batches:
        size = rows(batch)
        place = (torch.randperm(size, generator=generator) + offset) % count
        offset += size
        for group in range(count):
            index = (place == group).nonzero().flatten()
            if len(index):
                found[group].append(chosen(batch, index))
    return found


def of_mean(values: Sequence[float], share: float, weights: Sequence[float] | None = None) -> float:
    """Half a 95 % interval for the mean over all examples, from the means over groups of a sample.

    Args:
        values: one a group; infinite is the answer for fewer than two.
        share: of all examples that are in the sample.
        weights: of the groups in the sample's mean, as their examples; the same for all if None.
    """
    if share >= 1:
        return 0.0
    if len(values) < 2:
        return math.inf
    given = [1.0] * len(values) if weights is None else weights
    parts = [weight / math.fsum(given) for weight in given]
    mean = sum(map(mul, parts, values))
    # of a weighted mean, Σ wᵢ²(xᵢ − x̄)²·n/(n − 1): s²/n where all weigh the same
    squares = sum((part * (value - mean)) ** 2 for part, value in zip(parts, values, strict=True))
    spread = math.sqrt(squares * len(values) / (len(values) - 1))
    return student(len(values)) * spread * math.sqrt(1 - share)


class Groups:
    """A subject's examples dealt to groups; made at the trained point.

    Attributes:
        weights: of the groups in the mean over all examples.
    """

    def __init__(self, subject: Subject, point: Point) -> None:
        self._point = point
        groups = dealt(subject.batches, subject.seed)
        self._objectives = [Objective(replace(subject, batches=group), point, None) for group in groups]
        self.weights = [float(objective.examples) for objective in self._objectives]
        self._at_rest = self._losses()

    def _losses(self) -> list[float]:
        return [objective.value() for objective in self._objectives]

    def rises(self, perturbation: Sequence[Tensor]) -> list[float]:
        """The rise of the mean loss over each group."""
        with self._point.moved(perturbation):
            moved = self._losses()
        return [b - a for a, b in zip(self._at_rest, moved, strict=True)]


def lift(whole: float, halves: Sequence[float], share: float) -> float:
    """By how much fitting to a sample lifted a value that falls as ``c/m``: halves are lifted by ``2c/m``."""
    return abs(fmean(halves) - whole) * max(1 - share, 0.0)


def of_eigenvalues(
    operator_of: Callable[[Batches], SymmetricOperator],
    batches: Batches,
    vectors: Tensor,
    share: float,
    seed: int,
) -> tuple[list[float], int]:
    """The sampling error of every eigenvalue.

    With ``V`` the eigenvectors and ``M_g = VᵀH_gV`` of the groups: the jackknife over the eigenvalues of the
    mean of the ``M_g``, for spread and lift within the span of V, and to second order what the rest of the
    space lifts, ``Σ_g ‖(I − VVᵀ)H_g v_i‖² / (G(G − 1)·|λ_i|)``, other eigenvalues taken as small beside it.

    Args:
        operator_of: the Hessian of the loss over some batches.
        vectors: ``(n, k)``, unit eigenvectors of the sample, in the order of their values.
        share: of all examples that are in the sample.

    Returns:
        The errors, and the products spent, in products over the whole sample.
    """
    k = vectors.shape[1]
    if share >= 1:
        return [0.0] * k, 0
    inner, outer = [], []
    for group in dealt(batches, seed):
        with operator_of(group) as operator:
            products = operator @ vectors
        matrix = (vectors.T @ products).double().cpu()
        inner.append((matrix + matrix.T) / 2)
        outer.append((products.double().square().sum(dim=0).cpu() - matrix.square().sum(dim=0)).clamp_min(0))
    count = len(inner)
    if count < 2:
        return [math.inf] * k, k
    mean = torch.stack(inner).mean(dim=0)
    # the i-th is compared with the i-th, whatever their vectors do
    ranks = mean.diagonal().argsort().argsort()
    whole = torch.linalg.eigvalsh(mean)[ranks]
    left = torch.stack([torch.linalg.eigvalsh((count * mean - m) / (count - 1))[ranks] for m in inner])
    spread = ((count - 1) / count * (left - left.mean(dim=0)).square().sum(dim=0)).sqrt()
    within = (count - 1) * (left.mean(dim=0) - whole).abs()
    beyond = torch.stack(outer).sum(dim=0) / (count * (count - 1)) / whole.abs().clamp_min(1e-300)
    errors = student(count) * spread * math.sqrt(1 - share) + (within + beyond) * (1 - share)
    return [float(error) for error in errors], k


def of_trace(
    operator_of: Callable[[Batches], SymmetricOperator], batches: Batches, share: float, seed: int
) -> tuple[float, int]:
    """The sampling error of the trace, from the groups' ``xᵀH_g x`` over a few random x, and the products.

    The same x serve every group: what they miss of a trace is nearly the same for all and falls out of the
    spread, so that few do.
    """
    if share >= 1:
        return 0.0, 0
    values = []
    for group in dealt(batches, seed):
        with operator_of(group) as operator:
            signs = torch.stack(list(islice(probes(operator, seed), TRACE_PROBES)), dim=1)
            values.append(float((signs * (operator @ signs)).double().sum()) / TRACE_PROBES)
    return of_mean(values, share), TRACE_PROBES
