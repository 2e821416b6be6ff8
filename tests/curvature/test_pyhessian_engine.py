"""The PyHessian engine against matrices whose eigenvalues are known."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature.eigenpairs.pyhessian import PyHessianEngine, convergence_by_rule
from flatbench.curvature.eigenpairs.result import Eigenpairs, MeanLoss


def quadratic(matrix: Tensor, *terms: int) -> MeanLoss:
    """``½ wᵀ M w`` over two parameters of different shapes, in batches whose matrices differ."""
    size = len(matrix)
    parts = [nn.Parameter(torch.randn(2, 2).to(matrix)), nn.Parameter(torch.randn(size - 4).to(matrix))]

    def half(scale: float) -> Tensor:
        w = torch.cat([part.flatten() for part in parts])
        return scale * w @ matrix @ w / 2

    counts = list(terms or (1,))
    # batch i has the matrix i·M, so that wrong weights give a wrong Hessian
    mean = sum((i + 1) * n for i, n in enumerate(counts)) / sum(counts)
    losses = [lambda i=i: half((i + 1) / mean) for i in range(len(counts))]
    return MeanLoss(parts, losses, counts)


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def top(loss: MeanLoss, **options: float) -> Eigenpairs:
    return PyHessianEngine().top(loss, **{"k": 1, "tol": 1e-9, "max_iterations": 500, "seed": 1, **options})


def test_values_largest_in_magnitude_first_and_weighted_by_terms() -> None:
    found = top(quadratic(symmetric([5, -4, 3, 2, 1, 0.5]), 3, 1, 2), k=3)
    assert found.values == pytest.approx([5, -4, 3], rel=1e-6)
    assert found.settled == (True, True, True)


def test_vectors_are_unit_eigenvectors() -> None:
    matrix = symmetric([5, -4, 3, 2, 1, 0.5])
    found = top(quadratic(matrix), k=2)
    assert found.vectors.shape == (6, 2)
    for value, v in zip(found.values, found.vectors.T, strict=True):
        assert v.norm() == pytest.approx(1)
        torch.testing.assert_close(matrix @ v, value * v, atol=1e-3, rtol=0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_iterations", [2, 5, 20])
def test_residual_bounds_the_true_error(seed: int, max_iterations: int) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed)).double()
    loss = quadratic(symmetric(values.tolist(), seed), 2, 3)
    found = top(loss, k=2, seed=seed, max_iterations=max_iterations)
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert (values - value).abs().min() <= residual + 1e-12


def test_what_did_not_settle_is_said() -> None:
    found = top(quadratic(symmetric([5, -4.99, 4.98, 2, 1, 0.5])), max_iterations=3)
    assert found.settled == (False,)
    assert found.converged == (False,)
    assert found.products == 4  # three iterations and one for the residual


def test_settled_is_weaker_than_converged() -> None:
    loss = quadratic(symmetric([5, 4.9, 3, 2, 1, 0.5]))
    loose = top(loss, tol=1e-2)
    assert (loose.settled, loose.converged) == ((True,), (False,))
    assert top(loss, tol=1e-7, max_iterations=2000).residuals[0] < loose.residuals[0]


def test_settled_replays_pyhessians_rule() -> None:
    assert convergence_by_rule([1, 2, 2, 3, 4, 5, 7, 7], 0.1, 3) == [True, False, True]


def test_a_flat_loss_has_zero_curvature() -> None:
    found = top(quadratic(torch.zeros(6, 6).double()))
    assert (found.values, found.residuals, found.converged) == ((0.0,), (0.0,), (True,))
    assert float(found.vectors[:, 0].norm()) == pytest.approx(1)


def test_tiny_curvature_is_found_although_pyhessian_adds_1e_6_to_norms() -> None:
    found = top(quadratic(1e-7 * symmetric([5, 1, 0.5, 0.2, 0.1, 0.05])))
    assert found.values[0] == pytest.approx(5e-7, rel=1e-6)


def test_unused_and_linear_parameters_count_as_flat() -> None:
    used, linear, unused = (nn.Parameter(torch.ones(2).double()) for _ in range(3))
    loss = MeanLoss([used, linear, unused], [lambda: 3 * used.square().sum() + linear.sum()], [4])
    found = top(loss)
    assert loss.dimension == 6
    assert found.values[0] == pytest.approx(6)
    assert float(found.vectors[2:, 0].norm()) == 0


def test_seed_decides_and_the_global_state_stays() -> None:
    loss = quadratic(symmetric([5, -4, 3, 2, 1, 0.5]))
    state = torch.get_rng_state()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = top(loss, tol=0.1), top(loss, tol=0.1)
        other = top(loss, tol=0.1, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.values == again.values != other.values
    assert all(p.grad is None for p in loss.parameters)


def test_a_product_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        top(quadratic(torch.full((6, 6), float("inf")).double()))


def test_name_has_the_version() -> None:
    assert PyHessianEngine().name == "pyhessian 0.1"
