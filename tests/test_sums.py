"""Sums over long vectors keep the vectors' precision, and eigenvalues of long vectors theirs."""

from __future__ import annotations

import math

import pytest
import torch

from flatbench import sums
from flatbench.curvature import MatrixOperator, top_eigenpairs
from flatbench.optim.base.buffers import Buffers, scaled
from flatbench.sums import dot, length


@pytest.mark.parametrize("size", [0, 1, 1 << 15, 100_001, 4_000_000])
def test_sums_are_those_in_float64(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(size, generator=generator) for _ in range(2))
    other += one
    assert dot(one, other) == pytest.approx(float(one.double() @ other.double()), rel=1e-6)
    assert length(one) == pytest.approx(float(one.double().norm()), rel=1e-6)
    assert float(sums.norm(one.view(1, -1))) == pytest.approx(float(one.double().norm()), rel=1e-6)
    assert float(sums.inner(one, other)) == pytest.approx(float(one.double() @ other.double()), rel=1e-6)
    columns = torch.stack([one, other], dim=1)
    assert dot(columns[:, 0], columns[:, 1]) == pytest.approx(dot(one, other), rel=1e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_lengths_of_columns_have_the_columns_precision(kind: torch.dtype) -> None:
    columns = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(kind)
    found = sums.lengths(columns)
    assert found.dtype == kind
    torch.testing.assert_close(found, columns.norm(dim=0), rtol=4 * torch.finfo(kind).eps, atol=0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_lengths_of_any_scale(scale: float) -> None:
    vector = torch.full((1000,), scale)
    assert length(vector) == pytest.approx(scale * math.sqrt(1000), rel=1e-5)


def test_lengths_of_what_is_not_finite() -> None:
    assert math.isinf(length(torch.tensor([1.0, math.inf])))
    assert math.isnan(length(torch.tensor([1.0, math.nan])))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1000, 1 << 20])
def test_norms_of_short_tensors_are_torchs_to_the_bit(kind: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(kind).view(8, -1)[1:]
    wide = torch.promote_types(kind, torch.float32)
    assert torch.equal(sums.norm(tensor), torch.linalg.vector_norm(tensor, dtype=wide))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_perturbation_of_many_weights_has_the_length_rho(per_tensor: bool) -> None:
    """An embedding of a language model: by torch's own norm of 30 million numbers it was 0.2 % too long."""
    embedding = torch.zeros(30_000_000)
    gradient = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    move = scaled(Buffers([embedding]), [gradient], rho=0.05, per_tensor=per_tensor)
    assert float(move.values[0].double().norm()) == pytest.approx(0.05, rel=1e-6)
    assert float(move.norm) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.slow
def test_eigenvalues_of_millions_of_directions_are_certified_in_single_precision() -> None:
    """torch's own norm of so many numbers is off by 1e-4, and its eigenvalues were, beyond the true ones."""
    size = 4_000_000
    diagonal = 0.05 * torch.randn(size, generator=torch.Generator().manual_seed(0))
    diagonal[:8] = torch.tensor([13.6, 12.6, 10.7, -9.7, 8.9, 8.6, 8.1, -7.9])
    operator = MatrixOperator(lambda vector: diagonal * vector, dimension=size, dtype=torch.float32)
    found = top_eigenpairs(operator, 3, tol=1e-2, seed=1)
    assert all(found.certified)
    for value, bound, true in zip(found.values, found.upper_bounds, (13.6, 12.6, 10.7), strict=True):
        assert value <= true * (1 + 1e-6)
        assert value == pytest.approx(true, rel=1e-2)
        assert bound >= true
