"""Trace, norm, diagonal and density against matrices that are known, and how often their bands hold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flatbench.curvature import (
    ConvergenceWarning,
    HessianOperator,
    MatrixOperator,
    diagonal,
    frobenius_norm,
    spectral_density,
    trace,
)
from flatbench.errors import InputError
from tests.curvature.curvature_cases import CASES, symmetric

N = 150


def spectrum(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(N, generator=generator, dtype=torch.float64)
    if name == "outliers":
        return torch.cat([torch.tensor([30.0, 12, -8, 5]).double(), 0.3 + 0.2 * noise[4:]])
    if name == "power law":
        return 10 / torch.arange(1, N + 1).double()
    return noise + 0.5


@pytest.mark.parametrize("name", ["outliers", "power law", "bulk"])
@pytest.mark.slow
def test_the_trace_lies_within_two_standard_errors(name: str) -> None:
    values = spectrum(name)
    matrix, held = symmetric(values), 0
    for seed in range(200):
        found = trace(MatrixOperator(matrix), tol=0.05, max_products=150, seed=3 * seed)
        assert found.samples > 0
        held += abs(found.value - float(values.sum())) <= 2 * found.standard_error
    assert held / 200 >= 0.93


@pytest.mark.parametrize("name", ["outliers", "bulk"])
def test_the_norm_lies_within_two_standard_errors(name: str) -> None:
    values = spectrum(name)
    matrix, held = symmetric(values), 0
    for seed in range(100):
        found = frobenius_norm(MatrixOperator(matrix), seed=3 * seed)
        held += abs(found.value - float(values.norm())) <= 2 * found.standard_error
        assert found.value == pytest.approx(float(values.norm()), rel=0.2)
    assert held / 100 >= 0.93


# few searches tell the share only roughly; many are among the long tests
@pytest.mark.parametrize(("seeds", "share"), [(25, 0.9), pytest.param(200, 0.93, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["outliers", "power law", "bulk"])
@pytest.mark.slow
def test_the_density_lies_within_its_band(name: str, seeds: int, share: float) -> None:
    values = spectrum(name)
    matrix, held, count, of_seed = symmetric(values), 0, 0, []
    for seed in range(seeds):
        found = spectral_density(MatrixOperator(matrix), probes=6, steps=30, points=41, seed=20 * seed)
        bells = torch.exp(-((found.points[:, None] - values) ** 2) / (2 * found.width**2))
        true = bells.sum(dim=1) / (N * found.width * math.sqrt(2 * math.pi))
        seen = true > 0.01 * true.max()
        inside = ((found.lower <= true + 1e-9) & (true <= found.upper + 1e-9))[seen]
        held, count = held + int(inside.sum()), count + len(inside)
        of_seed.append(float(inside.double().mean()))
    assert held / count >= share


def test_the_density_integrates_to_one_and_counts_outliers_exactly() -> None:
    found = spectral_density(MatrixOperator(symmetric(spectrum("outliers"))), steps=40)
    assert float(torch.trapezoid(found.values, found.points)) == pytest.approx(1, abs=0.01)
    assert {30.0, 12.0} <= {round(value, 6) for value in found.outliers}
    assert (found.lower <= found.values).all()
    assert (found.values <= found.upper).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_diagonal_and_its_errors(seed: int) -> None:
    matrix = symmetric(spectrum("outliers"), seed)
    found = diagonal(MatrixOperator(matrix), tol=0.1, seed=seed)
    true = matrix.diagonal()
    assert found.converged
    assert float((found.values - true).norm() / true.norm()) < 0.2
    inside = (found.values - true).abs() <= 2 * found.standard_errors
    assert float(inside.double().mean()) > 0.9


@pytest.mark.parametrize("function", [trace, frobenius_norm])
def test_small_matrices_are_exact(function: Any) -> None:
    matrix = symmetric(torch.tensor([3.0, -2, 1, 0.5]))
    found = function(MatrixOperator(matrix))
    expected = matrix.trace() if function is trace else matrix.norm()
    assert found.value == pytest.approx(float(expected))
    assert (found.standard_error, found.samples, found.products) == (0.0, 0, 4)


class _Coarse(MatrixOperator):
    """Products of a matrix beside the right one, and what it says of their error."""

    def __init__(self, matrix: Tensor, error: Tensor) -> None:
        super().__init__(matrix + error)
        self.relative_error = float(error.norm() / matrix.norm())


@pytest.mark.parametrize("size", [12, N])
def test_the_products_own_error_is_told(size: int) -> None:
    matrix = symmetric(spectrum("power law")[:size])
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    error = 0.5 * matrix.norm() * (noise + noise.T) / (noise + noise.T).norm()
    right = {trace: float(matrix.trace()), frobenius_norm: float(matrix.norm())}
    for function, value in right.items():
        with pytest.warns(ConvergenceWarning, match="products' own error"):
            found = function(_Coarse(matrix, error), tol=0.05)
        assert not found.converged
        assert abs(found.value - value) <= 2 * found.standard_error + found.product_error
    with pytest.warns(ConvergenceWarning, match="exact to 0.5 only"):
        assert not diagonal(_Coarse(matrix, error), tol=0.5 - 0.1).converged
    fine = _Coarse(matrix, 1e-6 * error)
    assert trace(fine, tol=0.05).converged
    assert trace(fine, tol=0.05).product_error > 0


def test_a_limit_of_products_is_kept_and_said() -> None:
    operator = MatrixOperator(symmetric(spectrum("bulk")))
    with pytest.warns(ConvergenceWarning, match="standard error"):
        found = trace(operator, tol=1e-4, max_products=50)
    assert not found.converged
    assert found.products == 50
    with pytest.warns(ConvergenceWarning, match="diagonal"):
        assert diagonal(operator, tol=1e-4, max_products=40).products == 40


def test_a_sketch_lowers_the_error() -> None:
    operator = MatrixOperator(symmetric(spectrum("outliers")))
    plain, sketched = (trace(operator, tol=1e-9, rank=rank, max_products=60) for rank in (0, 10))
    assert sketched.standard_error < 0.5 * plain.standard_error


def test_of_a_model() -> None:
    case = CASES["mlp"]
    model, batches = case.make()
    operator = HessianOperator(model, case.loss, batches)
    with operator:
        dense = operator @ torch.eye(operator.dimension, dtype=torch.float64)
        found = trace(operator, tol=0.1)
        assert abs(found.value - float(dense.trace())) <= 4 * found.standard_error


@pytest.mark.parametrize(
    "call",
    [
        lambda operator: trace(operator, max_products=5),
        lambda operator: trace(operator, tol=0.0),
        lambda operator: trace(operator, rank=-1),
        lambda operator: diagonal(operator, max_products=5),
        lambda operator: spectral_density(operator, probes=1),
        lambda operator: spectral_density(operator, width=-1.0),
    ],
)
def test_bad_options(call: Any) -> None:
    with pytest.raises(InputError, match=r"max_products|tol|rank|probes"):
        call(MatrixOperator(symmetric(spectrum("bulk"))))


def test_too_little_memory_is_said_before_it_is_taken() -> None:
    operator = MatrixOperator(symmetric(spectrum("bulk")))
    operator.memory = N * 8 * 10
    for call in (trace, diagonal, spectral_density):
        with pytest.raises(InputError, match="about"):
            call(operator)
