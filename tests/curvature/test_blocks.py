"""Products block by block against those of the whole graph, and what is no chain of blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flatbench.curvature import GaussNewtonOperator, HessianOperator
from flatbench.curvature.operators import chain, precision
from flatbench.curvature.operators.blockwise import Blockwise
from flatbench.curvature.operators.loss_operator import LossOperator
from flatbench.curvature.operators.widened import Widened
from flatbench.errors import FlatbenchError, InputError
from tests.curvature import chain_cases as cases
from tests.curvature.curvature_cases import images, lora, on_mapping, on_tokens, on_tuple

QV = ["q_proj", "v_proj"]


def _adapted(build: Callable[..., nn.Module], targets: list[str], **options: Any) -> Callable[..., nn.Module]:
    return lambda **shape: lora(build(**shape), targets, **options)


FAMILIES: dict[str, tuple[Callable[..., nn.Module], Any, Callable[[int, int], Any]]] = {
    "gpt2": (_adapted(cases.gpt2, ["c_attn"], fan_in_fan_out=True), on_tokens, cases.tokens),
    "llama": (_adapted(cases.llama, QV), on_tokens, cases.tokens),
    "qwen2": (_adapted(cases.qwen2, [*QV, "down_proj"]), on_tokens, cases.tokens),
    "bert": (_adapted(cases.masked_bert, ["query", "value"]), cases.on_masked, cases.tokens),
    "roberta": (_adapted(cases.roberta, ["query", "dense"]), on_mapping, cases.classes),
    "vit": (_adapted(cases.vit, QV), on_mapping, lambda rows, _: images([rows])[0]),
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(
    make: Callable[..., LossOperator], count: int = 1, share: float = 0.6, way: str = "blocks"
) -> LossOperator:
    """Products, loss and gradient of a plan with little memory against one with much."""
    with make(memory=10**10) as generous:
        assert generous.plan.way == "whole graph"
        vectors = torch.randn(generous.dimension, count, generator=torch.Generator().manual_seed(1)).double()
        expected, point = generous @ vectors, generous.point()
    with make(memory=cases.tight(make, share)) as lean:
        assert lean.plan.way == way, lean.plan.way_reason
        assert relative(lean @ vectors, expected) < 1e-10
        assert lean.point()[0] == pytest.approx(point[0], rel=1e-12)
        assert relative(lean.point()[1], point[1]) < 1e-10
    return lean


@pytest.mark.parametrize(
    ("family", "space", "count"),
    [("gpt2", "all", 5), ("llama", "adapter", 1), ("bert", "merged", 2), ("vit", "all", 1)],
)
def test_products_by_blocks_are_those_of_the_whole_graph(family: str, space: str, count: int) -> None:
    build, loss, batch = FAMILIES[family]
    model, batches = cases.shaken(build()), [batch(1, 9)]
    compare(lambda **o: HessianOperator(model, loss, batches, space=space, **o), count)


def test_gauss_newton_products_too() -> None:
    model, batches = cases.shaken(lora(cases.vit(), QV)), images([1])

    def make(**options: Any) -> GaussNewtonOperator:
        return GaussNewtonOperator(model, batches=batches, space="merged", **options)

    compare(make, 4)


def _random(family: str, space: str, layers: int, width: int, rows: list[int], share: float) -> None:
    build, loss, batch = FAMILIES[family]
    model = cases.shaken(build(layers=layers, width=4 * width))  # two heads, each of an even width
    batches = [batch(count, 8) for count in rows]

    def make(**options: Any) -> HessianOperator:
        return HessianOperator(model, loss, batches, space=space, **options)

    with make(memory=10**10) as generous:
        vectors = torch.randn(generous.dimension, 2, generator=torch.Generator().manual_seed(1)).double()
        expected = generous @ vectors
    try:
        with make(memory=cases.tight(make, share), products="exact") as lean:
            # transformers' RMSNorm rounds to float32, and differently where rows are cut elsewhere
            assert relative(lean @ vectors, expected) < (1e-5 if family in ("llama", "qwen2") else 1e-10)
    except InputError as error:
        assert "would" in str(error)  # too little: said, not tried


_DRAWS = {
    "family": st.sampled_from(sorted(FAMILIES)),
    "space": st.sampled_from(["adapter", "merged", "all"]),
    "layers": st.integers(2, 6),
    "width": st.integers(1, 3),
    "rows": st.lists(st.integers(1, 3), min_size=1, max_size=3),
    "share": st.floats(0.2, 1.1),
}
_QUIETLY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=4, **_QUIETLY)
@given(**_DRAWS)
@pytest.mark.slow
def test_random_depths_and_widths(**drawn: Any) -> None:
    _random(**drawn)


@settings(max_examples=200, **_QUIETLY)
@given(**_DRAWS)
@pytest.mark.long
def test_many_random_depths_and_widths(**drawn: Any) -> None:
    _random(**drawn)


@pytest.mark.parametrize("space", ["adapter", "merged"])
def test_inputs_that_require_gradients_are_no_part_of_the_space(space: str) -> None:
    """What gradient checkpointing with peft asks for: the frozen embeddings' output requires a gradient."""
    build, loss, batch = FAMILIES["llama"]
    model: Any = cases.shaken(build())
    model.enable_input_require_grads()
    compare(functools.partial(HessianOperator, model, loss, [batch(1, 9)], space=space), count=2)


def test_adapters_that_are_merged_are_refused_with_little_memory_too() -> None:
    build, loss, batch = FAMILIES["llama"]
    model: Any = cases.shaken(build())
    make = functools.partial(HessianOperator, model, loss, [batch(1, 9)], space="adapter")
    little = cases.tight(make)
    model.merge_adapter()
    with pytest.raises(FlatbenchError, match="unmerge_adapter"):
        make(memory=little).point()


def test_nothing_stale_is_kept_after_a_change_of_the_weights() -> None:
    model = cases.shaken(cases.gpt2())
    lean = cases.causal(model, memory=cases.tight(functools.partial(cases.causal, model)))
    vector = torch.ones(lean.dimension, dtype=torch.float64)
    before = lean @ vector
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = lean @ vector
    assert relative(after, before) > 1e-3
    assert relative(after, cases.causal(model, memory=10**10) @ vector) < 1e-10


@pytest.mark.slow
def test_more_memory_keeps_more_graphs_and_gives_the_same_products() -> None:
    model = cases.shaken(lora(cases.llama(layers=6), QV))
    make = functools.partial(cases.causal, model, space="merged")
    with make(memory=10**10) as generous:
        vector = torch.randn(generous.dimension, generator=torch.Generator().manual_seed(1)).double()
        products = [generous @ vector]
    seen = []
    for share in (0.38, 0.55, 0.8):
        with make(memory=cases.tight(make, share)) as lean:
            assert lean.plan.way == "blocks"
            assert lean.plan.several_bytes <= lean.memory
            seen.append(sum(lean.plan.graphs))
            assert f"{seen[-1]} of 6 blocks' graphs kept" in lean.plan.describe()
            products.append(lean @ vector)
    assert seen[0] < seen[1] < seen[2] <= 6
    assert max(relative(product, products[0]) for product in products) < 1e-10


# -- what is no chain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "block", "reason"),
    [
        (cases.called_twice, cases.Block, "more than once"),
        (cases.scaled_between, cases.Block, "something else than the hidden state"),
        (cases.skipping, cases.Block, "by blocks is off"),
        (cases.value_residual, cases.WithValue, "by blocks is off"),
        (cases.gated, cases.Gated, "depends on the space"),
    ],
)
def test_what_is_no_chain_goes_the_old_way_and_says_so(between: Any, block: Any, reason: str) -> None:
    torch.manual_seed(0)
    model = cases.Plain(between, block).double()
    batch = (torch.randn(1, 5, 3).double(), torch.randint(0, 3, (1,)))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]).mean(1), batch[1])

    make = functools.partial(HessianOperator, model, loss, [batch])
    with make(memory=10**10) as generous:
        expected = generous @ torch.ones(generous.dimension, dtype=torch.float64)
    with make(memory=cases.tight(make)) as lean:
        assert lean.plan.way == "whole graph"
        assert reason in lean.plan.way_reason
        assert lean.plan.method == "central differences"
        assert relative(lean @ torch.ones(lean.dimension, dtype=torch.float64), expected) < 1e-5


def test_a_block_that_draws_at_random_is_no_chain() -> None:
    torch.manual_seed(0)
    model = cases.Plain(cases.in_a_row, cases.Stochastic).double()
    batch = (torch.randn(1, 3).double(), torch.tensor([1]))
    with HessianOperator(model, on_tuple, [batch]) as made:
        found, reason = made._find_chain(chain.chains(model), [batch])
    assert found is None
    assert "Stochastic" in reason


def test_plain_blocks_of_any_class_are_a_chain() -> None:
    torch.manual_seed(0)
    model = cases.Plain(cases.in_a_row, cases.Block).double()
    batch = (torch.randn(1, 3).double(), torch.tensor([1]))
    with HessianOperator(model, on_tuple, [batch]) as made:
        found, _ = made._find_chain(chain.chains(model), [batch])
    assert found is not None
    assert found.blocks == 4


def test_of_an_encoder_decoder_the_encoder_is_the_chain() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cases.shaken(cases.bart())
    ids = cases.tokens(1, 7)["input_ids"]
    batch = {"input_ids": ids, "labels": ids.flip(1)}
    with HessianOperator(model, cases.on_labels, [batch]) as made:
        found, reason = made._find_chain(chain.chains(model), [batch])
        assert found is not None, reason
        assert type(made._chain[0]).__name__ == "BartEncoderLayer"


def test_a_half_precision_base_is_widened_as_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(cases.llama(width=8), QV).to(torch.bfloat16)
    batches = [cases.tokens(1, 9)]
    make = functools.partial(HessianOperator, model, on_tokens, batches, space="adapter")
    with make(memory=10**10) as generous:
        vector = torch.randn(generous.dimension, generator=torch.Generator().manual_seed(1))
        expected = generous @ vector
    memory = cases.tight(make)
    monkeypatch.setattr(precision, "SHARE", 0.0)
    with make(memory=memory) as lean:
        assert lean.plan.way == "blocks"
        assert any(isinstance(parameter, Widened) for parameter in model.parameters())
        assert relative(lean @ vector, expected) < 1e-4


class _Cube(torch.autograd.Function):
    """Has derivatives of every order, and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * slope


class _Square(torch.autograd.Function):
    """Has a first derivative alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * slope


@pytest.mark.parametrize(
    ("function", "method"), [(_Cube, "double backward"), (_Square, "central differences")]
)
def test_operations_of_ones_own(function: Any, method: str) -> None:
    class Own(cases.Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * function.apply(self.inner(x))

    torch.manual_seed(0)
    model = cases.Plain(cases.in_a_row, Own).double()
    batch = (torch.randn(1, 3).double(), torch.tensor([1]))
    with HessianOperator(model, on_tuple, [batch]) as made:
        vector = torch.ones(made.dimension, dtype=torch.float64)
        assert (made @ vector).isfinite().all()
        assert made.plan.method == method
        if method == "double backward":
            found = Blockwise.built(
                lambda before: made._build(batch, before), list(model.blocks), made._parameters
            )
            assert found is not None
            parts = found.product(list(made.split(vector)), keep=False)
            blocks = torch.cat([part.flatten() for part in parts if part is not None])
            assert relative(blocks, made @ vector) < 1e-12
