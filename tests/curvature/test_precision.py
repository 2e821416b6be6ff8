"""Models in half precision inside of operators and spaces: what is widened, what is left, what is said."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature import GaussNewtonOperator, HessianOperator, check_symmetric
from flatbench.curvature.operators import precision
from flatbench.curvature.operators.entrance import entered
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.precision import computed_in, half_types, widened, widening_of
from flatbench.curvature.operators.widened import Widened
from flatbench.errors import InputError, NotApplicableError
from flatbench.tasks.base import Task
from flatbench.tasks.common import token_loss
from tests.curvature.curvature_cases import CASES, on_tuple

HALF = (torch.float16, torch.bfloat16)


def few_bits(model: nn.Module, kind: torch.dtype) -> nn.Module:
    return model.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).to(torch.float16).to(kind)


@pytest.fixture(params=[0.5, 0.0], ids=["copies", "layer by layer"])
def share(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(precision, "SHARE", request.param)
    return float(request.param)


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("name", ["bert", "gpt2 lora, merged", "vit lora, adapter", "cnn with batch norm"])
def test_products_are_those_of_the_model_in_float32(name: str, kind: torch.dtype, share: float) -> None:
    case = CASES[name]
    model, batches = case.make()
    single, half = few_bits(copy.deepcopy(model), torch.float32), few_bits(copy.deepcopy(model), kind)
    inputs = [_floats(batch, torch.float32) for batch in batches]
    own = HessianOperator(half, case.loss, inputs, space=case.space)
    other = HessianOperator(single, case.loss, inputs, space=case.space)
    assert own.dtype == torch.float32
    assert own.precision == "float32"
    vector = torch.randn(own.dimension, generator=torch.Generator().manual_seed(0))
    with own:
        assert own.relative_error == 0
        assert not half_types(half)
        torch.testing.assert_close(own @ vector, other @ vector, rtol=1e-6, atol=1e-7)
    assert kind in half_types(half)
    assert widening_of(half) is None


def _floats(batch: Any, kind: torch.dtype) -> Any:
    if isinstance(batch, tuple):
        return tuple(t.to(kind) if t.is_floating_point() else t for t in batch)
    return {k: v.to(kind) if v.is_floating_point() else v for k, v in batch.items()}


def test_graphs_hold_narrow_weights_where_they_are_widened_as_they_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "SHARE", 0.0)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).bfloat16()
    first = model[0].weight
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, Widened):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = torch.randn(2, 64)
    with computed_in(model, "float32", [first]) as found:  # type: ignore[list-item]
        assert found is not None
        assert found.copies == 64 * 64 * 4
        assert found.layerwise == 3 * 64 * 64 * 4 + 4 * 64 * 4
        assert "layer by layer" in found.describe()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(rows).square().mean()
            (gradient,) = torch.autograd.grad(loss, [first], create_graph=True)  # type: ignore[list-item]
            torch.autograd.grad(gradient.square().sum(), [first])  # type: ignore[list-item]
    # the moving weight and activations; three more weights would be 48 kB
    assert sum(held.values()) < 64 * 64 * 4 + 16_000


@pytest.mark.parametrize("how", ["tied data", "views of one tensor"])
def test_what_shares_its_memory_still_does_in_float32(how: str, share: float) -> None:
    whole = torch.randn(6, 4).bfloat16()
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).bfloat16()
    model[0].weight.data = whole[:4]
    model[1].weight.data = whole[:4] if how == "tied data" else whole[2:]
    batch = (torch.randn(3, 4), torch.randint(0, 4, (3,)))
    with computed_in(model, "float32"):
        assert model[0].weight.dtype == torch.float32
        model[0].weight.data[3].fill_(7.0)
        row = 3 if how == "tied data" else 1
        assert model[1].weight[row].eq(7).all()
    assert whole.ne(7).any()
    assert model[0].weight.data_ptr() == whole.data_ptr()
    if how == "tied data":
        assert HessianOperator(model, on_tuple, [batch], space="all").dimension == 16
        return
    with pytest.raises(NotApplicableError, match="same memory"):
        HessianOperator(model, on_tuple, [batch], space="all") @ torch.ones(32)


class Packed(nn.Parameter):
    """Four-bit numbers in the guise of bfloat16, as bitsandbytes can store them."""


class Quantised(nn.Module):
    """A layer that says in which type it computes, and casts to it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = Packed(torch.randn(4, 4).bfloat16(), requires_grad=False)
        self.compute_dtype = torch.bfloat16
        self.eighth = nn.Parameter(torch.randn(4).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.data.view(torch.int16).to(self.compute_dtype) / 2**15
        return nn.functional.linear(x.to(self.compute_dtype), weight)


def test_packed_numbers_are_left_alone_and_computed_with_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Quantised())
    packed = model[1].weight
    bits = packed.detach().clone()
    rows = torch.randn(5, 4)
    with computed_in(model, "float32") as found:
        assert found is not None
        assert found.stored == "bfloat16"
        assert packed.dtype == torch.bfloat16
        assert model[1].eighth.dtype == torch.float8_e4m3fn
        assert model(rows).dtype == torch.float32
    assert model[1].compute_dtype == torch.bfloat16
    assert model[1].weight is packed
    assert torch.equal(packed.view(torch.int16), bits.view(torch.int16))


def test_products_of_float32_are_whole_inside() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with computed_in(nn.Linear(2, 2), "float32") as found:
            assert found is None
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert torch.get_float32_matmul_precision() == "medium"
        with computed_in(nn.Linear(2, 2), "as_stored"):
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_exception_gives_the_weights_back() -> None:
    model = nn.Linear(3, 3).bfloat16()
    place, hooks = model.weight.data_ptr(), len(model._forward_pre_hooks)
    for context in (computed_in(model, "float32"), widened(model, torch.float64)):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.data_ptr() == place
        assert len(model._forward_pre_hooks) == hooks


# -- what is said --------------------------------------------------------------------------------------------


class _OneSided(torch.autograd.Function):
    """``x²`` whose gradient forgets half of the entries: no symmetric derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sum().square() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.sum() * torch.arange(x.numel()).view_as(x)


class Bent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return _OneSided.apply(self.weight) * x.mean()  # type: ignore[no-any-return]


def test_the_message_names_half_precision_where_it_takes_part() -> None:
    torch.manual_seed(0)
    batch = torch.ones(2, 3)
    model = Bent().half()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        found: Tensor = model(batch.to(next(model.parameters()).dtype))
        return found

    with pytest.raises(InputError, match=r"not symmetric.*float16.*precision 'float32'"):
        check_symmetric(HessianOperator(model, loss, [batch], precision="as_stored"))
    with pytest.raises(InputError, match=r"not symmetric") as caught:
        check_symmetric(HessianOperator(model, loss, [batch]))
    assert "float16" not in str(caught.value)


def test_half_precision_as_stored_says_how_coarse_it_is() -> None:
    case = CASES["bert"]
    model, batches = case.make()
    for kind in HALF:
        half = few_bits(copy.deepcopy(model), kind)
        with HessianOperator(half, case.loss, batches, space=case.space, precision="as_stored") as operator:
            assert operator.relative_error >= torch.finfo(kind).eps
            check_symmetric(operator)
    with GaussNewtonOperator(half, batches=batches, space=case.space) as operator:
        assert operator.relative_error == 0


class Stubborn(nn.Module):
    """Casts to half precision whatever its weights are."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(4, 3), factor

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.weight.dtype == torch.float32:
            x = x * self.factor
        found: Tensor = self.layer(x.to(self.layer.weight.dtype) if self.factor != 1 else x.bfloat16())
        return found


@pytest.mark.parametrize(
    ("factor", "said"), [(2.0, "another function in float32"), (1.0, "cannot be computed in float32")]
)
def test_a_model_that_is_not_itself_in_float32_is_refused(factor: float, said: str) -> None:
    torch.manual_seed(0)
    model, batch = Stubborn(factor).bfloat16(), (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))

    def loss(rows: Any) -> tuple[Tensor, int]:
        return on_tuple(model, rows), len(rows[1])

    with pytest.raises(NotApplicableError, match=said), entered(model, "all", loss=loss, batches=[batch]):
        pass
    with entered(model, "all", loss=loss, batches=[batch], precision="as_stored"):
        assert model.layer.weight.dtype == torch.bfloat16


# -- losses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "criterion",
    [
        lambda x, y: nn.functional.cross_entropy(x, y),
        lambda x, y: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).to(x))(x, y),
        lambda x, y: nn.functional.nll_loss(x.log_softmax(-1), y),
        lambda x, y: -torch.log_softmax(x, -1)[torch.arange(4), y].mean(),
        lambda x, y: nn.functional.mse_loss(x, nn.functional.one_hot(y, 3).to(x)),
        lambda x, y: nn.functional.binary_cross_entropy_with_logits(x, nn.functional.one_hot(y, 3).to(x)),
    ],
)
def test_losses_of_half_precision_are_taken_in_float32(criterion: Any) -> None:
    torch.manual_seed(0)
    model, rows, labels = nn.Linear(4, 3).bfloat16(), torch.randn(4, 4).bfloat16(), torch.tensor([0, 1, 2, 0])
    logits = model(rows)
    with losses_in_float32(model):
        found = criterion(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, criterion(logits.float(), labels), rtol=1e-6, atol=0)
    single = nn.Linear(4, 3)
    with losses_in_float32(single):
        assert criterion(single(rows.float()), labels).dtype == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    model, batch = nn.Linear(4, 3), (torch.randn(2, 4), torch.tensor([0, 1]))
    made = HessianOperator(model, on_tuple, [batch], precision="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'half' is none of float32, as_stored"):
        made @ torch.ones(15)


def test_a_task_of_half_precision_has_losses_in_float32() -> None:
    """Training and evaluation, whatever the task gives back."""
    torch.manual_seed(0)
    model, labels = nn.Linear(4, 3).bfloat16(), torch.randint(0, 3, (8,))
    rows = torch.randn(8, 4).bfloat16()

    def outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch["rows"])
        return nn.functional.cross_entropy(logits, batch["labels"]), logits

    task: Any = SimpleNamespace(outputs=outputs, terms=lambda b: len(b["labels"]), metrics=lambda x, y: {})
    batch = {"rows": rows, "labels": labels}
    loss = Task.loss(task, model, batch)
    exact = float(nn.functional.cross_entropy(model(rows).float(), labels))
    assert float(loss) == exact
    assert exact * 2**7 != round(exact * 2**7)
    assert Task.evaluate(task, model, [batch])["loss"] == exact
    words = {"rows": rows.view(2, 4, 4), "labels": labels.view(2, 4)}

    def by_token(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch["rows"])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), logits

    assert token_loss.evaluate(model, [words], by_token, shifted=False)["loss"] == pytest.approx(
        exact, abs=1e-7
    )
