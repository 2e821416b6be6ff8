"""How often certified eigenvalues, upper bounds and stated errors are wrong: searches with known spectra.

A search is one spectrum, one number of eigenvalues, one end, one tolerance, one precision and one way: from a
random start, in blocks of two, with a basis that is restarted early, from eigenvectors with noise (a warm
start), from the wrong eigenvectors, or cut off after a few products. Half of the matrices are diagonal, of up
to 20,000 rows; half are dense in a random basis, so that products round as a model's do. The truth of a
float32 search is the spectrum of the float32 matrix, in float64.

What is counted, of values unless it says searches, always beyond rounding:

- ``residual_violated``: no eigenvalue lies within the residual;
- ``bound_violated`` (searches): an upper bound lies below its eigenvalue;
- ``certified_wrong``: certified, and further than ``tol`` from its eigenvalue;
- ``error_violated``: further from its eigenvalue than the stated error; for one without an upper bound,
  from every eigenvalue;
- ``certified``, of those ``asked``: values of searches that were not cut off.

Products are those of a certified search and of one that stops by its residuals, from one random start.

    python benchmarks/certificates.py --seeds 12
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from statistics import fmean
from typing import Any

import record
import torch
from torch import Tensor

from flatbench.curvature import ConvergenceWarning, Eigenpairs, MatrixOperator, top_eigenpairs

#: beyond rounding: of the largest eigenvalue, in units of the precision's epsilon
ROUNDING = 16
DENSE = 400
WAYS = ("random start", "blocks of two", "early restarts", "warm start", "wrong start", "cut off")


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _uniform(generator: torch.Generator, size: int) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _above(*top: float) -> Callable[[torch.Generator, int], Tensor]:
    """Outliers above a bulk between 0 and 1."""
    return lambda g, n: torch.cat([torch.tensor(top).double(), _uniform(g, n - len(top))])


def _wishart(generator: torch.Generator, n: int, *spikes: float) -> Tensor:
    """Eigenvalues of a sample covariance of 2n' samples, n' = min(n, 400), zeros beside them, and spikes."""
    rows = min(n, DENSE) - len(spikes)
    values = torch.linalg.eigvalsh(torch.cov(_normal(generator, rows, 2 * rows)))
    return torch.cat([torch.tensor(spikes).double(), values, torch.zeros(n - rows - len(spikes)).double()])


SPECTRA: dict[str, Callable[[torch.Generator, int], Tensor]] = {
    "separated": _above(10, 7, 5, 4, 3, 2.5),
    "pair": _above(10, 9.9),
    "triple": _above(10, 9.99, 9.98),
    "two clusters": _above(10, 9.99, 5, 4.99, 4.98),
    "both ends": _above(10, 9.99, -9.995, -9.98),
    "repeated": lambda g, n: torch.cat(
        [torch.tensor([5.0, 5, 5, -5, 3, 3, 2]).double(), 0.3 * _normal(g, n - 7)]
    ),
    "power law": lambda g, n: torch.cat(
        [10 / torch.arange(1, n - n // 10 + 1).double(), -2 * _uniform(g, n // 10)]
    ),
    "wishart": _wishart,
    "spiked": lambda g, n: _wishart(g, n, 8, 4, 3.9),
    "indefinite": lambda g, n: _normal(g, n),
    "low rank": lambda g, n: torch.cat(
        [torch.tensor([5.0, 4, 3, -4.5]).double(), torch.zeros(n - 4).double()]
    ),
    "zero": lambda g, n: torch.zeros(n, dtype=torch.float64),
    "k near n": lambda g, n: _normal(g, 7),
}


class Case:
    """A symmetric matrix with its eigenvalues, diagonal or dense."""

    def __init__(self, name: str, seed: int, dtype: torch.dtype, dense: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = DENSE if dense else int(torch.tensor([300, 2000, 20000])[seed % 3])
        entries = SPECTRA[name](generator, n)
        self.matrix: Tensor | None = None
        if dense:
            basis, _ = torch.linalg.qr(_normal(generator, len(entries), len(entries)))
            whole = (basis * entries) @ basis.T
            self.matrix = ((whole + whole.T) / 2).to(dtype)
            self.values, self.vectors = torch.linalg.eigh(self.matrix.double())
        else:
            self.entries = entries.to(dtype)
            self.values = self.entries.double()
        self.dtype, self.generator = dtype, generator
        self.rounding = ROUNDING * torch.finfo(dtype).eps * float(self.values.abs().max())

    def operator(self) -> MatrixOperator:
        """It, to be multiplied with."""
        if self.matrix is not None:
            return MatrixOperator(self.matrix)
        return MatrixOperator(lambda v: self.entries * v, len(self.entries), self.dtype)

    def order(self, which: str) -> Tensor:
        """Places of the eigenvalues, the most wanted one's first."""
        return (self.values.abs() if which == "LM" else self.values).argsort(descending=True)

    def start(self, places: Tensor, noise: float) -> Tensor:
        """Eigenvectors, with noise of that length."""
        n = len(self.values)
        exact = (
            torch.eye(n, dtype=torch.float64)[:, places] if self.matrix is None else self.vectors[:, places]
        )
        noisy = exact + noise / math.sqrt(n) * _normal(self.generator, *exact.shape)
        return noisy.to(self.dtype)


def search(
    case: Case, way: str, k: int, which: str, tol: float, seed: int
) -> tuple[Eigenpairs, Eigenpairs | None]:
    """A certified search, and one by residuals from the same random start."""
    options: dict[str, Any] = {"tol": tol, "which": which, "seed": seed, "max_products": 40 * k + 200}
    operator, order = case.operator(), case.order(which)
    n = len(case.values)
    if way == "blocks of two":
        options["block"] = 2
    elif way == "early restarts":
        # room for about twice the shortest basis
        operator.memory = operator.reserved_memory() + (2 * k + 16) * n * case.dtype.itemsize
    elif way == "warm start":
        options["start"] = case.start(order[:k], 0.1)
    elif way == "wrong start":
        options["start"] = case.start(order[1 : k + 1], 1e-3)
    elif way == "cut off":
        options["max_products"] = k + 4
    certified = top_eigenpairs(operator, k, **options)
    by_residual = top_eigenpairs(operator, k, **options, certify=False) if way == "random start" else None
    return certified, by_residual


def judge(case: Case, found: Eigenpairs, which: str, tol: float, way: str) -> Counter[str]:
    """What is wrong with the result, counted."""
    counts: Counter[str] = Counter(searches=1)
    true = case.values[case.order(which)][: len(found.values)]
    wanted = true.abs() if which == "LM" else true
    below = False
    for i, value in enumerate(found.values):
        expected, got = float(wanted[i]), abs(value) if which == "LM" else value
        nearest = float((case.values - value).abs().min())
        counts["values"] += 1
        counts["residual_violated"] += nearest > found.residuals[i] + case.rounding
        below |= found.upper_bounds[i] < expected - case.rounding
        off = abs(got - expected) if math.isfinite(found.upper_bounds[i]) else nearest
        counts["error_violated"] += off > found.errors[i] + case.rounding
        counts["certified_wrong"] += (
            found.certified[i] and abs(got - expected) > tol * abs(expected) + case.rounding
        )
        if way != "cut off":
            counts["asked"] += 1
            counts["certified"] += found.certified[i]
    counts["bound_violated"] += below
    return counts


def simulate(seeds: int) -> dict[str, Any]:
    """All searches."""
    warnings.simplefilter("ignore", ConvergenceWarning)  # a search that is cut off says so
    by: dict[str, Counter[str]] = defaultdict(Counter)
    products: dict[str, list[tuple[int, int]]] = defaultdict(list)
    grid = itertools.product(SPECTRA, (torch.float32, torch.float64), (False, True), range(seeds))
    for name, dtype, dense, seed in grid:
        case = Case(name, seed, dtype, dense)
        for number, (k, which, tol) in enumerate(itertools.product((1, 5), ("LA", "LM"), (1e-2, 1e-3))):
            way = WAYS[(seed + number) % len(WAYS)]
            if way == "wrong start" and len(case.values) < k + 1:
                continue
            found, plain = search(case, way, k, which, tol, seed=1000 * seed + number)
            counts = judge(case, found, which, tol, way)
            precision = str(dtype).removeprefix("torch.")
            for key in ("all", f"spectrum: {name}", f"way: {way}", f"precision: {precision}", f"k: {k}"):
                by[key] += counts
            if plain is not None:
                products[f"k = {k}, tol = {tol:g}"].append((found.products, plain.products))
                products[f"k = {k}, tol = {tol:g}, {name}"].append((found.products, plain.products))
    return {
        "counts": {key: _shares(counts) for key, counts in by.items()},
        "products": {
            key: {
                "searches": len(pairs),
                "certified": round(fmean(a for a, _ in pairs), 2),
                "by_residual": round(fmean(b for _, b in pairs), 2),
                "ratio": round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 3),
            }
            for key, pairs in sorted(products.items())
        },
    }


def _shares(counts: Counter[str]) -> dict[str, float]:
    found = {
        key: counts[key] for key in ("searches", "values", "asked", "residual_violated", "bound_violated")
    }
    found |= {key: counts[key] for key in ("certified_wrong", "error_violated", "certified")}
    return {
        **found,
        "bound_violated_share": round(counts["bound_violated"] / counts["searches"], 5),
        "certified_wrong_share": round(counts["certified_wrong"] / max(counts["certified"], 1), 5),
        "certified_share": round(counts["certified"] / max(counts["asked"], 1), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=12, help="of every spectrum, precision and basis")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    found = simulate(arguments.seeds)
    record.write("certificates", {**found, "seconds": round(time.perf_counter() - begun)})


if __name__ == "__main__":
    main()
