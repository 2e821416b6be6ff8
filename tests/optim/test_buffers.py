"""Flat buffers over parameters of several types, against what is done tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flatbench.optim import SAM, FriendlySAM
from flatbench.optim.base.buffers import Buffers, inner, norm, scaled, total_norm
from tests.optim import plain_rules
from tests.optim.models import adapted, problem, trainable

SHAPES = [(3, 4), (5,), (2, 2, 2), (7,), (4, 3)]
TYPES = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.bfloat16]


def tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(t) for s, t in zip(SHAPES, TYPES, strict=True)]


def test_there_and_back() -> None:
    given = tensors()
    layout = Buffers(given)
    buffers = layout.flatten(given)
    assert [b.dtype for b in buffers] == [torch.float32, torch.bfloat16, torch.float64]
    for view, tensor in zip(layout.unflatten(buffers), given, strict=True):
        assert torch.equal(view, tensor)
    missing = layout.unflatten(layout.flatten([None, *given[1:]]))
    assert not missing[0].any()


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_flattened_is_a_copy(count: int) -> None:
    given = [torch.ones(3) for _ in range(count)]
    layout = Buffers(given)
    for buffer in layout.weights():
        buffer.zero_()
    assert all(tensor.all() for tensor in given)


def test_norms_and_inner_products() -> None:
    first, second = tensors(0), tensors(1)
    layout = Buffers(first)
    a, b = layout.flatten(first), layout.flatten(second)
    each = torch.stack([t.double().norm() for t in first])
    torch.testing.assert_close(layout.in_order(layout.norms(a)).double(), each, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm(a).double(), each.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(total_norm(layout.norms(a)).double(), each.norm(), rtol=1e-6, atol=0)
    expected = sum((x.double() * y.double()).sum() for x, y in zip(first, second, strict=True))
    torch.testing.assert_close(inner(a, b).double(), expected, rtol=1e-6, atol=1e-6)


def test_one_number_a_tensor() -> None:
    layout = Buffers(tensors())
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    by_kind = layout.by_kind(numbers)
    assert torch.equal(layout.in_order(by_kind), numbers)
    for view, number in zip(layout.unflatten(layout.spread(by_kind)), numbers, strict=True):
        assert (view == number).all()


@pytest.mark.parametrize("per_tensor", [False, True])
def test_scaled(per_tensor: bool) -> None:
    given = tensors()
    layout = Buffers(given)
    move = scaled(layout, layout.flatten(given), 0.3, per_tensor)
    lengths = [t.double().norm() for t in given]
    total = torch.stack(lengths).norm()
    for value, tensor, length in zip(move.values, given, lengths, strict=True):
        expected = (0.3 * tensor.double() / (length if per_tensor else total)).to(tensor.dtype)
        torch.testing.assert_close(
            value, expected, rtol=1e-2 if tensor.dtype == torch.bfloat16 else 1e-6, atol=0
        )
    expected_norm = 0.3 * (len(given) ** 0.5 if per_tensor else 1)
    assert float(move.norm) == pytest.approx(expected_norm, rel=1e-2)
    assert not move.skipped


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_useless_direction_moves_nothing(value: float, per_tensor: bool) -> None:
    layout = Buffers(tensors())
    move = scaled(layout, layout.flatten([torch.full_like(t, value) for t in tensors()]), 0.3, per_tensor)
    assert move.skipped
    assert all(not v.any() for v in move.values)
    assert float(move.norm) == 0


def test_sam_on_parameters_of_two_types() -> None:
    """A head in float64 beside an adapter in float32, as backbones in half precision have it."""
    model = adapted(dtype=torch.float32)
    model.base_model.model.head.double()  # type: ignore[union-attr, operator]
    model.base_model.model.head.register_forward_pre_hook(lambda _, x: (x[0].double(),))  # type: ignore[union-attr]
    twin = copy.deepcopy(model)
    optimizer = SAM(torch.optim.SGD(trainable(model), lr=0.1), model, rho=0.1)
    base = torch.optim.SGD(trainable(twin), lr=0.1)
    for seed in range(5):
        optimizer.step(problem(model, seed))
        plain_rules.sam(twin, base, problem(twin, seed), {}, 0.1)
    for own, expected in zip(trainable(model), trainable(twin), strict=True):
        assert own.dtype == expected.dtype
        assert (own - expected).norm() <= 1e-6 * expected.norm()


def test_memory_follows_a_group_that_is_added() -> None:
    model = adapted()
    optimizer = FriendlySAM(torch.optim.SGD(trainable(model), lr=0.1), model)
    optimizer.step(problem(model))
    before = [value.clone() for value in optimizer.layout.unflatten(optimizer._memory)]
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra]})
    after = optimizer.layout.unflatten(optimizer._memory)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert not after[-1].any()
    optimizer.step(problem(model))
