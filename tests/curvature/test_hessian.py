"""Hessian operators against dense Hessians, whatever the model, the batches and the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator, check_symmetric, top_eigenpairs
from flatbench.errors import FlatbenchError, InputError
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


def test_a_loss_that_is_not_finite() -> None:
    model, batches = CASES["mlp"].make()
    made = HessianOperator(model, lambda m, b: on_tuple(m, b) * float("nan"), batches)
    with pytest.raises(FlatbenchError, match="the loss is nan"):
        top_eigenpairs(made)


def test_a_batch_that_the_model_rejects() -> None:
    model, _ = CASES["mlp"].make()
    made = HessianOperator(model, on_tuple, [(torch.zeros(3, 9).double(), torch.zeros(3).long())])
    with pytest.raises(InputError, match="rejects a batch: RuntimeError: mat1 and mat2"):
        top_eigenpairs(made)


def test_a_loss_that_ignores_the_space() -> None:
    model, batches = CASES["mlp"].make()
    made = HessianOperator(model, lambda m, b: b[0].square().mean(), batches)
    with pytest.raises(FlatbenchError, match="depends on no parameter"):
        top_eigenpairs(made)


def test_a_loss_that_is_no_number() -> None:
    model, batches = CASES["mlp"].make()
    with pytest.raises(InputError, match="must be one number"):
        HessianOperator(model, lambda m, b: m(b[0]), batches) @ torch.ones(len(dense("mlp"))).double()


def test_vectors_of_a_wrong_length() -> None:
    with pytest.raises(InputError, match="vectors of length"):
        operator("mlp") @ torch.ones(3)


def test_losses_that_are_no_means_are_not_cut() -> None:
    model, batches = CASES["mlp"].make()

    def of_the_batch(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).var()

    one = [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]
    with HessianOperator(model, of_the_batch, one) as made:
        room = made.plan.peak_bytes
    cramped = HessianOperator(
        model, of_the_batch, one, memory=room // 2 + 4 * 8 * made.dimension, products="exact"
    )
    with pytest.raises(InputError, match=r"not the mean over its examples|do not hold"):
        cramped @ torch.ones(made.dimension).double()


def test_a_linear_loss_has_no_curvature() -> None:
    model, batches = CASES["mlp"].make()
    made = HessianOperator(model, lambda m, b: sum(p.sum() for p in m.parameters()), batches)
    assert check_symmetric(made) == 0
    found = top_eigenpairs(made, 2)
    assert found.values == (0.0, 0.0)
    assert all(found.converged)


def _two_batches() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(10, 4, generator=generator).double(), torch.randint(0, 3, (10,), generator=generator)
    return model, [(x[:7], y[:7]), (x[7:], y[7:])]


def _weighted(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], weight=torch.tensor([1.0, 2, 5]).double())


def _sum(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def _noisy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(nn.functional.dropout(batch[0], 0.5)), batch[1])


@pytest.mark.parametrize(
    ("loss", "said"), [(_weighted, "mean over its rows"), (_sum, "mean over its rows"), (_noisy, "random")]
)
def test_a_loss_that_is_no_mean_is_refused(loss: Any, said: str) -> None:
    """By an operator as by a checkpoint, where it does not say of how many terms it is the mean."""
    model, batches = _two_batches()
    operator = HessianOperator(model, loss, batches)
    with pytest.raises(InputError, match=said):
        operator @ torch.ones(operator.dimension, dtype=torch.float64)


def test_a_sum_over_one_batch_and_a_mean_with_its_terms_are_taken() -> None:
    model, batches = _two_batches()
    one = HessianOperator(model, _sum, [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))])
    counted = HessianOperator(model, lambda m, b: (_sum(m, b) / len(b[1]), len(b[1])), batches)
    vector = torch.ones(one.dimension, dtype=torch.float64)
    torch.testing.assert_close(one @ vector, 10 * (counted @ vector))


class _Pooled(nn.Module):
    """Averages over all places, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(30, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids))).mean(dim=1) * 4)
        return found


@pytest.mark.parametrize(
    ("shortest", "longest", "rows"), [(8, 41, 32), (10, 61, 32), (3, 17, 96), (20, 129, 16)]
)
def test_padding_that_matters_is_kept_whatever_the_lengths(shortest: int, longest: int, rows: int) -> None:
    """Of a few rows another cutting is the best than of all, and may be none: no comparison at all."""
    torch.manual_seed(0)
    model = _Pooled().double()
    lengths = torch.randint(shortest, longest, (96,))
    lengths[::rows] = longest - 1
    mask = (torch.arange(longest - 1) < lengths[:, None]).long()
    ids, labels = torch.randint(1, 30, mask.shape) * mask, torch.randint(0, 3, (96,))
    batches = [
        {"ids": ids[i : i + rows], "attention_mask": mask[i : i + rows], "labels": labels[i : i + rows]}
        for i in range(0, 96, rows)
    ]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["ids"]), batch["labels"])

    cut, kept = (HessianOperator(model, loss, batches, shorten=shorten) for shorten in (True, False))
    vector = torch.ones(cut.dimension, dtype=torch.float64)
    assert cut.point()[0] == pytest.approx(kept.point()[0], rel=1e-12)
    torch.testing.assert_close(cut @ vector, kept @ vector, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("what", ["a rare class", "classes in order", "one weight"])
def test_weighted_means_are_refused_wherever_the_weights_are(what: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, labels, weights = torch.randn(160, 4).double(), torch.arange(160) % 2, torch.ones(160).double()
    of_classes = torch.tensor([0.1, 5.0, 1.0]).double() if what == "classes in order" else None
    if what == "a rare class":
        labels[70], of_classes = 2, torch.tensor([1.0, 1.0, 20.0]).double()
    elif what == "classes in order":
        labels = torch.arange(160) // 64
    else:
        weights[150] = 1000
    batches = [(x[i : i + 32], labels[i : i + 32], weights[i : i + 32]) for i in range(0, 160, 32)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        each = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none", weight=of_classes)
        own = batch[2] if of_classes is None else of_classes[batch[1]]
        return (each * batch[2]).sum() / own.sum()

    operator = HessianOperator(model, loss, batches)
    with pytest.raises(InputError, match="is not the mean over its rows"):
        operator.point()


def test_a_loss_that_views_its_labels_is_taken_of_batches_without_padding() -> None:
    """As transformers' masked language models do; rows that lost columns must be in one piece for that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()
    ids = torch.randint(1, 7, (4, 12))
    mask = (torch.arange(12) < torch.tensor([[5], [4], [5], [4]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        labels = batch["labels"].view(-1)
        logits = model(batch["input_ids"]).flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels), int((labels >= 0).sum())

    operator = HessianOperator(model, loss, [batch])
    with operator:
        assert operator.plan.padding > 0.3
    whole = HessianOperator(model, loss, [batch], shorten=False)
    vector = torch.ones(operator.dimension, dtype=torch.float64)
    torch.testing.assert_close(operator @ vector, whole @ vector)
