"""Hessian operators against dense Hessians, whatever the model, the batches and the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator, top_eigenpairs
from flatbench.errors import InputError
from tests.curvature.curvature_cases import CASES, dense, on_tuple


def operator(name: str, **options: Any) -> HessianOperator:
    case = CASES[name]
    model, batches = case.make()
    return HessianOperator(model, case.loss, batches, space=case.space, **options)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_products_are_those_of_the_dense_hessian(name: str) -> None:
    matrix, made = dense(name), operator(name)
    assert made.dimension == len(matrix)
    assert made.dtype == torch.float64
    vectors = torch.randn(len(matrix), 3, generator=torch.Generator().manual_seed(1)).double()
    with made:
        assert made.plan.graph == "kept"
        assert relative(made @ vectors, matrix @ vectors) < 1e-10
        assert relative(made @ vectors[:, 0], matrix @ vectors[:, 0]) < 1e-10
    assert made.products == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_are_within_their_stated_error(name: str) -> None:
    matrix = dense(name)
    values = torch.linalg.eigvalsh(matrix)
    values = values[values.abs().argsort(descending=True)]
    k = min(5, len(values))
    found = top_eigenpairs(operator(name), k)
    # DoRA's fifth is zero up to rounding
    assert all(done for done, value in zip(found.converged, found.values, strict=True) if abs(value) > 1e-12)
    for value, error, residual, vector, true in zip(
        found.values, found.errors, found.residuals, found.vectors.T, values, strict=False
    ):
        assert abs(abs(value) - abs(float(true))) <= error
        assert error <= max(residual, 1e-3 * abs(value)) + 1e-12
        assert value == pytest.approx(float(vector @ matrix @ vector), rel=1e-9)
        assert float((matrix @ vector - value * vector).norm()) <= residual + 1e-9


def test_padding_is_left_out_where_it_does_not_matter() -> None:
    with operator("bert lora, merged") as short, operator("bert lora, merged", shorten=False) as long:
        assert short.plan.padding > 0.1
        assert long.plan.padding == 0


def test_padding_is_kept_where_the_loss_depends_on_it() -> None:
    case = CASES["bert lora, merged"]
    model, batches = case.make()

    def by_width(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        loss, terms = case.loss(model, batch)
        return loss * batch["input_ids"].shape[1], terms

    with HessianOperator(model, by_width, batches, space="merged") as made:
        assert made.plan.padding == 0
        vector = torch.ones(made.dimension, dtype=torch.float64)
        expected = 9 * dense("bert lora, merged") @ vector
        assert relative(made @ vector, expected) < 1e-10


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "bert lora, adapter",
        pytest.param("gpt2, tied, by tokens", marks=pytest.mark.slow),
        "vit lora, merged",
    ],
)
def test_every_plan_gives_the_same_products(name: str) -> None:
    with operator(name) as generous:
        whole = generous.plan
        needed = whole.peak_bytes * 3 // 2 + 4 * 8 * generous.dimension
    vector = torch.randn(generous.dimension, generator=torch.Generator().manual_seed(2)).double()
    expected = dense(name) @ vector
    seen = set()
    for share in (1.0, 0.9, 0.6, 0.4, 0.3):
        try:
            with operator(name, memory=int(needed * share), products="exact") as made:
                plan = made.plan
                assert plan.peak_bytes <= needed * share
                assert relative(made @ vector, expected) < 1e-10
                seen.add((plan.graph, len(plan.kept) + len(plan.rebuilt)))
        except InputError as error:
            assert "memory" in str(error)  # one row's graph is too large: said, not tried
    assert len({graph for graph, _ in seen}) >= 2
    with pytest.raises(InputError, match="about"):
        operator(name, memory=300 + 4 * 8 * generous.dimension, products="exact").reserved_memory()


def test_little_memory_turns_to_differences_and_says_so() -> None:
    with operator("vit lora, merged") as generous:
        one_row = generous.plan.peak_bytes / 11
    room = int(one_row * 1.1) + 4 * 8 * generous.dimension
    with operator("vit lora, merged", memory=room) as made:
        vector = torch.ones(made.dimension, dtype=torch.float64)
        product = made @ vector
        assert made.plan.method == "central differences"
        assert "memory" in made.plan.describe()
        assert relative(product, dense("vit lora, merged") @ vector) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "bert lora, adapter"])
def test_differences_state_their_error(name: str) -> None:
    vector = torch.randn(len(dense(name)), generator=torch.Generator().manual_seed(3)).double()
    with operator(name, products="differences") as made:
        error = relative(made @ vector, dense(name) @ vector)
        assert error < 1e-6
        assert made.relative_error < 1e-5
        assert error < 20 * max(made.relative_error, 1e-9)


def test_differences_in_float32_are_good_to_a_thousandth() -> None:
    case = CASES["vit lora, merged"]
    model, batches = case.make()
    model.float()
    batches = [{**b, "pixel_values": b["pixel_values"].float()} for b in batches]
    with HessianOperator(model, case.loss, batches, space="merged", products="differences") as made:
        assert made.dtype == torch.float32
        found = top_eigenpairs(made, 2)
    true = torch.linalg.eigvalsh(dense("vit lora, merged"))
    true = true[true.abs().argsort(descending=True)][:2]
    for value, error, expected in zip(found.values, found.errors, true.tolist(), strict=True):
        assert abs(value - expected) <= error + 1e-3 * abs(expected)


def test_low_precision_weights_are_accumulated_in_float32() -> None:
    case = CASES["mlp"]
    model, batches = case.make()
    model.to(torch.bfloat16)
    many = [(x.to(torch.bfloat16), y) for x, y in batches] * 40
    few = many[: len(batches)]
    vector = torch.randn(len(dense("mlp")), generator=torch.Generator().manual_seed(4))
    repeated = HessianOperator(model, on_tuple, many) @ vector
    once = HessianOperator(model, on_tuple, few) @ vector
    assert repeated.dtype == torch.float32
    assert relative(repeated, once) < 1e-5  # a bfloat16 sum of 120 terms would be off by a hundredth


@pytest.mark.parametrize("name", ["vit lora, merged", "vit lora, adapter", "cnn with batch norm"])
@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was_found(name: str, broken: bool) -> None:
    case = CASES[name]
    model, batches = case.make()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers()]
        return [
            [t.detach().clone() for t in tensors],
            [t.data_ptr() for t in tensors],
            [(p.requires_grad, None if p.grad is None else p.grad.data_ptr()) for p in model.parameters()],
            [module.training for module in model.modules()],
            torch.get_rng_state(),
        ]

    before = state()
    made = HessianOperator(model, case.loss, batches, space=case.space)
    if broken:
        with pytest.raises(ZeroDivisionError), made:
            made @ torch.ones(made.dimension).double()
            raise ZeroDivisionError
    else:
        with torch.no_grad():
            top_eigenpairs(made, 2)
    after = state()
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert before[1:4] == after[1:4]
    assert torch.equal(before[4], after[4])


def test_blocks_are_the_diagonal_blocks() -> None:
    matrix, made = dense("mlp"), operator("mlp")
    found, start = made.blocks(), 0
    assert list(found) == ["0", "2"]
    for block in found.values():
        end = start + block.dimension
        identity = torch.eye(block.dimension, dtype=torch.float64)
        torch.testing.assert_close(block @ identity, matrix[start:end, start:end], atol=1e-12, rtol=1e-10)
        start = end
    assert start == len(matrix)


def test_merged_curvature_does_not_see_the_gauge_and_adapter_curvature_does() -> None:
    mixing = torch.tensor([[3.0, 1.0], [0.0, 0.5]]).double()
    tops: dict[str, list[float]] = {"merged": [], "adapter": []}
    for gauged in (False, True):
        case = CASES["vit lora, merged"]
        model, batches = case.make()
        if gauged:
            layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
            with torch.no_grad():
                for layer in layers:
                    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    B.copy_(B @ mixing)
                    A.copy_(torch.linalg.solve(mixing, A))
        for space, found in tops.items():
            made = HessianOperator(model, case.loss, batches, space=space)
            found.append(top_eigenpairs(made, 1, tol=1e-9).values[0])
    assert tops["merged"][0] == pytest.approx(tops["merged"][1], rel=1e-6)
    assert tops["adapter"][0] != pytest.approx(tops["adapter"][1], rel=0.1)


def test_merging_takes_one_copy_of_the_adapted_weights() -> None:
    case = CASES["vit lora, merged"]
    model, batches = case.make()
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    frozen = [layer.base_layer.weight.data_ptr() for layer in layers]
    everything = {p.data_ptr() for p in model.parameters()}
    with HessianOperator(model, case.loss, batches, space="merged"):
        new = {p.data_ptr() for p in model.parameters()} - everything
        assert len(new) == len(layers)
    assert [layer.base_layer.weight.data_ptr() for layer in layers] == frozen


# -- bad input --------------------------------------------------------------------------------------------


def test_no_examples() -> None:
    for batches in ([], [(torch.zeros(0, 4), torch.zeros(0).long())]):
        with pytest.raises(InputError, match="no examples"):
            HessianOperator(nn.Linear(4, 3), on_tuple, batches)


@pytest.mark.parametrize(
    ("space", "message"),
    [("half", "none of adapter"), ("adapter", "no parameter"), (lambda name: False, "no parameter")],
)
def test_spaces_that_are_not_there(space: Any, message: str) -> None:
    model, batches = CASES["mlp"].make()
    with pytest.raises(InputError, match=message):
        HessianOperator(model, on_tuple, batches, space=space)


def test_a_batch_that_the_model_rejects() -> None:
    model, _ = CASES["mlp"].make()
    made = HessianOperator(model, on_tuple, [(torch.zeros(3, 9).double(), torch.zeros(3).long())])
    with pytest.raises(InputError, match="rejects a batch: RuntimeError: mat1 and mat2"):
        top_eigenpairs(made)


def test_vectors_of_a_wrong_length() -> None:
    with pytest.raises(InputError, match="vectors of length"):
        operator("mlp") @ torch.ones(3)
