"""Cross entropy in chunks of tokens against that of whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators import entropy, head
from tests.curvature import chain_cases as cases
from tests.curvature.curvature_cases import lora, on_tokens

CLASSES = 13
CHUNKS = "in chunks of tokens"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head is large, and a chunk holds three tokens."""
    monkeypatch.setattr(head, "LARGE", 2)
    monkeypatch.setattr(entropy, "CHUNK", 3 * 8 * CLASSES)


def everything(layer: nn.Linear, loss: Callable[[Tensor, Tensor], Tensor], chunked: bool) -> tuple[Any, str]:
    """Loss, gradient and a product of its Hessian in the input, the weight and the bias."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, CLASSES, (2, 6), generator=generator)
    y[0, :3] = -100
    mode = head.Chunked(frozenset({id(layer.weight)}) if chunked else frozenset())
    with mode:
        value = loss(layer(x.sin()), y) * 1.7
    variables = [x, *layer.parameters()]
    value = value + value.square()  # a slope that depends on the point
    slopes = torch.autograd.grad(value, variables, create_graph=True)
    along = [torch.randn(s.shape, generator=generator, dtype=torch.float64) for s in slopes]
    return [value, *slopes, *torch.autograd.grad(slopes, variables, along)], mode.told


def _capped(z: Tensor, y: Tensor) -> Tensor:
    z = (z / 3.0).tanh() * 3.0
    return cross_entropy(z[..., 1:, :].reshape(-1, z.size(-1)), y[:, 1:].reshape(-1), reduction="sum")


def _scaled(z: Tensor, y: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()((0.3 * z.contiguous()).view(-1, z.shape[-1]), y.view(-1))


def _weighted(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z.flatten(0, 1), y.flatten(), weight=torch.ones(CLASSES).double())


def _some_classes(z: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(z[..., :7].flatten(0, 1), y.flatten().clamp(-100, 6))


def _twice_used(z: Tensor, y: Tensor) -> Tensor:
    return z.square().mean() + cross_entropy(z[0], y[0])


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda z, y: cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten()), CHUNKS),
        (lambda z, y: cross_entropy(z.view(-1, CLASSES), y.view(-1), label_smoothing=0.1), CHUNKS),
        (lambda z, y: cross_entropy(z.double()[1], y[1]), CHUNKS),
        (_capped, CHUNKS),
        (_scaled, CHUNKS),
        (_twice_used, "whole, for square"),
        (_weighted, "whole, for cross_entropy"),
        (_some_classes, "whole, for __getitem__"),
        (lambda z, y: cross_entropy(z.transpose(1, 2), y), "whole, for transpose"),
        (lambda z, y: nll_loss(z.flatten(0, 1).log_softmax(-1), y.flatten()), "whole, for log_softmax"),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_chunks_are_exact_and_what_is_not_known_is_computed_whole(loss: Any, told: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, CLASSES, bias=bias).double()
    found, how = everything(layer, loss, chunked=True)
    expected, _ = everything(layer, loss, chunked=False)
    assert how == told
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-12)


def test_a_mean_of_no_terms_is_torchs() -> None:
    layer = nn.Linear(4, CLASSES).double()
    with head.Chunked(frozenset({id(layer.weight)})):
        none = cross_entropy(layer(torch.zeros(3, 4).double()), torch.full((3,), -100))
    assert bool(none.isnan())


def test_the_logits_of_a_float64_model_that_rounds_them_are_rounded() -> None:
    layer, x, y = nn.Linear(4, CLASSES).double(), torch.randn(3, 4).double(), torch.tensor([1, 2, 3])
    with head.Chunked(frozenset({id(layer.weight)})) as mode:
        found = cross_entropy(layer(x).float(), y)
    assert mode.told == CHUNKS
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(cross_entropy(layer(x).float(), y)), rel=1e-6)


@pytest.mark.parametrize("space", ["adapter", "all"])
@pytest.mark.parametrize("build", [cases.gpt2, cases.llama], ids=["tied", "untied"])
def test_products_of_models_with_a_large_vocabulary(build: Any, space: str, monkeypatch: Any) -> None:
    targets = ["c_attn", "mlp.c_fc"] if build is cases.gpt2 else ["q_proj", "up_proj"]
    model = cases.shaken(lora(build(), targets, fan_in_fan_out=build is cases.gpt2))
    batches = [cases.tokens(2, 9)]

    def product(**options: Any) -> tuple[Tensor, Any]:
        with HessianOperator(model, on_tokens, batches, space=space, **options) as made:
            vector = torch.randn(made.dimension, generator=torch.Generator().manual_seed(1)).double()
            return made @ vector, made.plan

    found, plan = product(memory=10**10)
    assert (plan.way, plan.head) == ("whole graph", CHUNKS)
    monkeypatch.setattr(head, "LARGE", 10**6)
    expected, plan = product(memory=10**10)
    assert (plan.way, plan.head) == ("whole graph", "")
    assert float((found - expected).norm() / expected.norm()) < 1e-10
