"""Lanczos against spectra that are known: stated errors hold, nothing is missed, nothing fails silently."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flatbench.curvature import (
    ConvergenceWarning,
    Eigenpairs,
    MatrixOperator,
    check_symmetric,
    top_eigenpairs,
)
from flatbench.errors import FlatbenchError, InputError
from tests.curvature.curvature_cases import CASES, dense, symmetric

#: `benchmarks/certificates.py` has thousands
SEEDS = range(10)


def bulk(seed: int, *top: float, size: int = 300, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rest = spread * torch.randn(size - len(top), generator=generator, dtype=torch.float64)
    return torch.cat([torch.tensor(top, dtype=torch.float64), rest])


SPECTRA = {
    "decaying": lambda seed: bulk(seed, 10, -6, 5, 4, -3.5, spread=0.5),
    "nearly degenerate": lambda seed: bulk(seed, 10, 9.93, -9.86, 9.8, 9.71),
    "a bulk and nothing else": bulk,
    "power law": lambda seed: 1 / torch.arange(1, 301).double() * (-1.0) ** torch.arange(300),
    "repeated": lambda seed: bulk(seed, 5, 5, 5, -5, 3, 3, 2, spread=0.3),
    "opposite pairs": lambda seed: bulk(seed, 4, -4, 2, -2, 1.5, -1.5, spread=0.2),
    "low rank": lambda seed: bulk(seed, 5, 4, 3, spread=0.0),
    "low rank, two signs": lambda seed: bulk(seed, 5, 4, 3, -10, -9, -8, spread=0.0),
    "six dimensions": lambda seed: torch.tensor([3.0, -2, 1, 1, 0.5, 1]).double(),
}


def wanted(values: Tensor, k: int, which: str = "LM") -> Tensor:
    keys = {"LM": values.abs(), "LA": values, "SA": -values}[which]
    return values[keys.argsort(descending=True)][:k]


def check(found: Eigenpairs, values: Tensor, k: int, which: str = "LM", certified: bool = True) -> None:
    expected = wanted(values, k, which)
    got = torch.tensor(found.values, dtype=torch.float64)
    if which == "LM":  # the order within an opposite pair is open
        expected, got = expected.abs(), got.abs()
    # a value that is zero up to rounding has no relative error
    resolved = expected.abs() > 1e-9 * expected.abs().max()
    assert all(done for done, has in zip(found.converged, resolved, strict=True) if has)
    if certified:
        assert all(done for done, has in zip(found.certified, resolved, strict=True) if has)
        bounds = [-bound if which == "SA" else bound for bound in found.upper_bounds]
        for bound, true in zip(bounds, wanted(values, k, which).tolist(), strict=True):
            assert bound >= (abs(true) if which == "LM" else -true if which == "SA" else true) - 1e-14
    for value, error, true in zip(got.tolist(), found.errors, expected.tolist(), strict=True):
        assert abs(value - true) <= error + 1e-14
        assert abs(value - true) <= 1e-3 * abs(true) + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_errors_hold_over_seeds(name: str, k: int) -> None:
    for seed in SEEDS:
        values = SPECTRA[name](seed)
        found = top_eigenpairs(MatrixOperator(symmetric(values, seed)), k, seed=seed, max_products=600)
        check(found, values, k)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_errors_hold_on_models_over_seeds(name: str) -> None:
    values = torch.linalg.eigvalsh(dense(name))
    for seed in SEEDS:
        found = top_eigenpairs(MatrixOperator(dense(name)), 5, seed=seed, max_products=600)
        check(found, values, 5)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_the_largest_and_the_smallest(which: str) -> None:
    for name in ("decaying", "repeated", "power law"):
        values = SPECTRA[name](0)
        found = top_eigenpairs(MatrixOperator(symmetric(values)), 3, which=which, max_products=600)
        check(found, values, 3, which)


def test_vectors_are_orthonormal_and_residuals_are_true() -> None:
    matrix = symmetric(SPECTRA["nearly degenerate"](1))
    found = top_eigenpairs(MatrixOperator(matrix), 5)
    v = found.vectors
    torch.testing.assert_close(v.T @ v, torch.eye(5).double(), atol=1e-10, rtol=0)
    for value, residual, vector in zip(found.values, found.residuals, v.T, strict=True):
        assert float((matrix @ vector - value * vector).norm()) == pytest.approx(residual, rel=1e-6, abs=1e-9)


def test_a_residual_holds_what_rounding_adds() -> None:
    """A space that is complete after four steps has no residual but rounding's, which is not zero."""
    values = torch.tensor([5.0, 4, 4, 3, *[0] * 2000]).double()
    for seed in range(6):
        found = top_eigenpairs(diagonal(values, torch.float32), 3, seed=seed)
        for value, residual in zip(found.values, found.residuals, strict=True):
            assert float((values - value).abs().min()) <= residual <= 1e-5 * 5


@pytest.mark.slow
def test_a_residual_holds_what_restarts_add() -> None:
    """Each restart rounds all vectors anew: some hundred products leave 10 eps and more."""
    matrix = symmetric(above_a_bulk(1, (10, 9.9)), 1)
    operator = MatrixOperator(matrix)
    operator.memory = operator.reserved_memory() + 26 * len(matrix) * 8
    found = top_eigenpairs(operator, 5, which="LM", seed=1, max_products=400)
    exact, own = torch.linalg.eigvalsh(matrix), 40 * torch.finfo(torch.float64).eps
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert float((exact - value).abs().min()) <= residual + own


#: outliers that stand close together above a bulk, as a trained network's Hessian has them
CLUSTERS = {
    "pair": (1, (10, 9.9), 1e-3, torch.float32),
    "triple": (1, (10, 9.99, 9.98), 1e-3, torch.float64),
    "pair of five": (5, (10, 9.99), 1e-3, torch.float64),
    "two clusters": (4, (10, 9.99, 5, 4.99, 4.98), 1e-3, torch.float64),
    "k inside a cluster": (2, (10, 9.995, 9.99, 9.985), 1e-4, torch.float64),
    "both ends": (3, (10, 9.99, -9.995, -9.98), 1e-4, torch.float64),
    "copies inside a cluster": (4, (10, 10, 9.99, 9.99, 9.98), 1e-4, torch.float64),
}

#: a third value beside the fourth, inside the bulk: the longest of the searches
LONGEST = pytest.param("pair of five", marks=pytest.mark.slow)


def above_a_bulk(seed: int, top: tuple[float, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.tensor(top).double(), torch.rand(300, generator=generator, dtype=torch.float64)])


def diagonal(values: Tensor, dtype: torch.dtype = torch.float64) -> MatrixOperator:
    entries = values.to(dtype)
    return MatrixOperator(lambda v: entries * v, len(values), dtype)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("name", [LONGEST, *(name for name in CLUSTERS if name != LONGEST.values[0])])
def test_what_is_certified_is_the_eigenvalue(name: str, block: int) -> None:
    k, top, tol, dtype = CLUSTERS[name]
    for seed in range(5):
        values = above_a_bulk(seed, top)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # float32 does not resolve all
            found = top_eigenpairs(
                diagonal(values, dtype), k, tol=tol, seed=seed, block=block, max_products=600
            )
        expected = wanted(values, k).abs().tolist()
        assert dtype == torch.float32 or all(found.certified)
        for value, error, bound, certified, true in zip(
            found.values, found.errors, found.upper_bounds, found.certified, expected, strict=True
        ):
            assert abs(abs(value) - true) <= error + 1e-12
            assert bound >= true - 1e-12
            assert not certified or abs(abs(value) - true) <= tol * true + 1e-12


def test_a_warm_start_from_the_wrong_vectors_is_certified_too() -> None:
    values = above_a_bulk(0, (10, 9.9, 5))
    wrong = torch.eye(303, dtype=torch.float64)[:, 1:3]  # the second and the third
    found = top_eigenpairs(diagonal(values), 1, start=wrong)
    assert found.certified == (True,)
    assert found.values[0] == pytest.approx(10, rel=1e-3)


def test_restarts_keep_the_bound() -> None:
    values = above_a_bulk(1, (10, 9.99, 9.98))
    operator = diagonal(values)
    operator.memory = len(values) * 8 * 14
    for k in (1, 3):
        found = top_eigenpairs(operator, k, max_products=2000)
        check(found, values, k)
        assert found.products > 9  # what the memory holds


@pytest.mark.slow
def test_a_restart_beside_locked_values_loses_nothing_of_their_residuals() -> None:
    """What lies in the vectors that are dropped couples them to the locked ones; lost, H seems asymmetric."""
    for seed in range(3):
        values = above_a_bulk(seed, (10, 9.9))
        operator = diagonal(values)
        operator.memory = operator.reserved_memory() + 26 * len(values) * 8
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the bulk is dense, the basis short
            found = top_eigenpairs(operator, 5, which="LA", seed=seed, max_products=300)
        true = wanted(values, 5, "LA").tolist()
        for value, error, expected in zip(found.values, found.errors, true, strict=True):
            assert abs(value - expected) <= error + 1e-12


@pytest.mark.parametrize("name", ["decaying", "low rank", "low rank, two signs", "repeated"])
def test_the_smallest_are_the_largest_of_the_negative(name: str) -> None:
    """To the last product: where rounding ends a search, at either end."""
    values = SPECTRA[name](0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the rank is below five
        smallest = top_eigenpairs(diagonal(-values), 5, which="SA")
        largest = top_eigenpairs(diagonal(values), 5, which="LA")
    assert smallest.products == largest.products < 150
    assert smallest.certified == largest.certified
    assert [-value for value in smallest.values] == pytest.approx(largest.values, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20])
def test_the_scale_does_not_matter(scale: float) -> None:
    """Squares of 1e-20 are no numbers of float32 any more."""
    values = above_a_bulk(2, (10, 9.9, 5))
    plain = top_eigenpairs(diagonal(values, torch.float32), 3)
    scaled = top_eigenpairs(diagonal(scale * values, torch.float32), 3)
    assert scaled.certified == plain.certified == (True,) * 3
    assert [value / scale for value in scaled.values] == pytest.approx(plain.values, rel=1e-5)


def test_without_a_correct_digit_nothing_has_converged() -> None:
    values = torch.cat([torch.tensor([5.0, 4.0]), torch.full((100,), 1e-9)]).double()
    with pytest.warns(ConvergenceWarning, match="1 of 3 eigenvalues did not reach"):
        found = top_eigenpairs(diagonal(values, torch.float32), 3)
    assert found.converged == (True, True, False)
    assert not found.certified[2]
    assert abs(found.values[2] - 1e-9) <= found.errors[2]


@pytest.mark.slow
def test_the_bound_is_wrong_as_rarely_as_is_said() -> None:
    """Stopped early, where it is loosest; 99 % are promised."""
    wrong = 0
    for seed in range(400):
        values = above_a_bulk(seed, (10, 9.9))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = top_eigenpairs(diagonal(values), 1, which="LA", seed=1000 + seed, max_products=4)
        wrong += found.upper_bounds[0] < 10
    assert wrong <= 12


@pytest.mark.slow
def test_a_bound_that_the_search_itself_refutes_is_given_up() -> None:
    """One start in a hundred hides an eigenvector for some steps; when it turns up, its bound is no bound."""
    values = SPECTRA["low rank, two signs"](0)
    for seed in range(250):
        found = top_eigenpairs(diagonal(values), 1, which="SA", seed=seed)
        assert found.certified == (True,)
        assert found.upper_bounds[0] <= found.values[0]  # it is a lower one at this end


def test_without_a_certificate_one_copy_of_a_repeated_value_may_be_all_and_the_result_says_so() -> None:
    values = SPECTRA["repeated"](0)
    found = top_eigenpairs(MatrixOperator(symmetric(values)), 3, certify=False)
    assert not any(found.certified)
    assert [round(abs(v), 2) for v in found.values] == [5, 5, 3]  # 5 and -5; the other copies are not seen
    blocks = top_eigenpairs(MatrixOperator(symmetric(values)), 3, certify=False, block=4)
    assert [round(abs(v), 2) for v in blocks.values] == [5, 5, 5]


def test_a_small_basis_is_restarted() -> None:
    values = SPECTRA["nearly degenerate"](2)
    operator = MatrixOperator(symmetric(values))
    operator.memory = 300 * 8 * (8 + 14)
    found = top_eigenpairs(operator, 5, max_products=2000)
    check(found, values, 5)
    assert found.products > 14
    operator.memory = 300 * 8 * 10
    with pytest.raises(InputError, match=r"memory: 24 kB do not hold .* about"):
        top_eigenpairs(operator, 5)


def test_warm_start_takes_fewer_products() -> None:
    values = SPECTRA["decaying"](3)
    matrix = symmetric(values)
    moved = matrix + 0.01 * symmetric(torch.randn(300).double(), 9)
    old = top_eigenpairs(MatrixOperator(matrix), 5)
    cold, warm = (
        top_eigenpairs(MatrixOperator(moved), 5, start=start, certify=False) for start in (None, old.vectors)
    )
    check(warm, torch.linalg.eigvalsh(moved), 5, certified=False)
    assert warm.products < cold.products


def test_non_convergence_is_warned_about_and_said() -> None:
    operator = MatrixOperator(symmetric(bulk(0)))
    with pytest.warns(ConvergenceWarning, match="did not reach a relative error of 0.001 within 12"):
        found = top_eigenpairs(operator, 5, max_products=12)
    assert not all(found.converged)
    assert len(found.values) == 5
    assert found.products == 12
    operator = MatrixOperator(symmetric(SPECTRA["decaying"](0)))
    near = top_eigenpairs(operator, 1, certify=False).products
    with pytest.warns(
        ConvergenceWarning, match=f"could not be certified to a relative error of 0.001 within {near}"
    ):
        found = top_eigenpairs(operator, 1, max_products=near)
    assert found.converged == (True,)
    assert not found.certified[0]


def test_the_seed_decides_and_the_global_state_stays() -> None:
    operator = MatrixOperator(symmetric(SPECTRA["decaying"](0)))
    state = torch.get_rng_state()
    first, again, other = (top_eigenpairs(operator, 2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert first.values == again.values != other.values


@pytest.mark.parametrize(("k", "message"), [(0, "k: 0"), (301, "k: 301 eigenvalues wanted of a 300")])
def test_bad_k(k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        top_eigenpairs(MatrixOperator(symmetric(bulk(0))), k)


@pytest.mark.parametrize("part", [1e-4, 1e-2, 1.0])
def test_an_operator_that_is_not_symmetric(part: float) -> None:
    skew = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).double()
    operator = MatrixOperator(symmetric(SPECTRA["decaying"](0)) + part * (skew - skew.T))
    with pytest.raises(InputError, match="not symmetric"):
        top_eigenpairs(operator, 2)
    with pytest.raises(InputError, match="not symmetric"):
        check_symmetric(operator)


def test_rounding_that_looks_asymmetric_widens_the_errors() -> None:
    """In single precision the products of a large model contradict each other by 1e-3 of the norm."""
    matrix = symmetric(SPECTRA["decaying"](0)).float()
    size = float(torch.linalg.matrix_norm(matrix, 2))
    skew = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    skew = (skew - skew.T) / torch.linalg.matrix_norm(skew - skew.T, 2)
    rough = MatrixOperator(matrix + 2e-3 * size * skew)
    smooth = top_eigenpairs(MatrixOperator(matrix), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it cannot be told to within tol
        found = top_eigenpairs(rough, 1)
    assert found.errors[0] > max(3e-4 * size, smooth.errors[0])  # the tolerance of a usual operator
    assert abs(found.values[0] - size) <= found.errors[0]
    with pytest.raises(InputError, match="not symmetric"):
        top_eigenpairs(MatrixOperator(matrix + 0.1 * size * skew), 1)


def test_products_that_are_not_finite() -> None:
    with pytest.raises(FlatbenchError, match="not finite"):
        top_eigenpairs(MatrixOperator(lambda v: v * float("nan"), 5))


@pytest.mark.parametrize("start", [torch.ones(7), torch.full((300,), float("inf"))])
def test_a_start_that_does_not_fit(start: Tensor) -> None:
    with pytest.raises(InputError, match="start"):
        top_eigenpairs(MatrixOperator(symmetric(bulk(0))), 1, start=start)


def test_operators_made_of_functions_need_a_dimension() -> None:
    with pytest.raises(InputError, match="dimension"):
        MatrixOperator(lambda v: v)
    with pytest.raises(InputError, match="square"):
        MatrixOperator(torch.ones(2, 3))


def test_float32_reaches_what_float32_can() -> None:
    values = SPECTRA["decaying"](0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = top_eigenpairs(MatrixOperator(symmetric(values).float()), 5, tol=1e-5, certify=False)
        certified = top_eigenpairs(MatrixOperator(symmetric(values).float()), 5, tol=1e-4)
    assert all(certified.certified)
    expected: Any = wanted(values, 5).tolist()
    for value, error, true in zip(found.values, found.errors, expected, strict=True):
        assert abs(value - true) <= error
