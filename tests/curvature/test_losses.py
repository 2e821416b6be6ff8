"""What operators take as a loss, and what they refuse: sums, weighted means, noise, padding that counts."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flatbench.curvature import HessianOperator, check_symmetric, top_eigenpairs
from flatbench.errors import FlatbenchError, InputError
from tests.curvature.curvature_cases import CASES, dense, on_tuple


def test_a_loss_that_is_not_finite() -> None:
    model, batches = CASES["mlp"].make()
    made = HessianOperator(model, lambda m, b: on_tuple(m, b) * float("nan"), batches)
    with pytest.raises(FlatbenchError, match="the loss is nan"):
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


# -- losses of models ------------------------------------------------------------------------------------


def _causal_rows(*counts: int) -> dict[str, Tensor]:
    """Rows of which so many labels count, all from the row's beginning."""
    torch.manual_seed(0)
    ids = torch.randint(1, 13, (len(counts), 6))
    labels = torch.where(torch.arange(6) < torch.tensor(counts)[:, None], ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _cut(batch: dict[str, Any], *sizes: int) -> list[dict[str, Any]]:
    ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [
        {k: v[a:b] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
        for a, b in pairwise(ends)
    ]


def _llama() -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=13, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return LlamaForCausalLM(config).double().eval()


class _Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch)


def _prompted() -> nn.Module:
    model = _llama()
    kind = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, kind).double()


def _prefixed() -> nn.Module:
    kind = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(_llama(), kind).double()


@pytest.mark.slow
@pytest.mark.parametrize("make", [_llama, lambda: _Around(_llama()), _prompted, _prefixed])
def test_how_rows_are_batched_does_not_matter(make: Any) -> None:
    """The terms of a wrapped model, and of one with virtual tokens before each row, are counted right."""
    model, rows = make(), _causal_rows(2, 2, 6, 2, 6, 6, 3, 1)
    loss = model(**rows).loss.item()
    points = []
    for sizes in ((8,), (4, 3, 1), (1,) * 8):
        with HessianOperator(model, batches=_cut(rows, *sizes), space="all") as operator:
            value, gradient = operator.point()
            points.append(gradient)
            assert value == pytest.approx(loss, rel=1e-6)
    for gradient in points[1:]:
        torch.testing.assert_close(gradient, points[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("empty", [0, 2])
@pytest.mark.parametrize("told", [False, True])
def test_a_row_without_labels_may_stand_anywhere(empty: int, told: bool) -> None:
    """Its own loss is 0/0, or the mean of no terms; the batch's is neither."""
    counts = [4, 3, 5]
    counts[empty] = 0
    model, batch = _llama(), _causal_rows(*counts)

    def loss(model: nn.Module, batch: Any) -> Any:
        mean = model(**batch).loss
        return (mean, (batch["labels"][:, 1:] != -100).sum()) if told else mean

    with HessianOperator(model, loss, [batch], space="all") as made:
        assert made.point()[0] == pytest.approx(model(**batch).loss.item(), rel=1e-6)
        vector = torch.ones(made.dimension, dtype=made.dtype)
        expected = HessianOperator(model, None, [batch], space="all") @ vector
        assert torch.allclose(made @ vector, expected, rtol=1e-4, atol=1e-6)


def test_what_the_trainer_adds_to_a_batch_changes_nothing() -> None:
    model, rows = _llama(), _causal_rows(2, 5, 6, 2)
    plain = HessianOperator(model, batches=[rows]).point()[0]
    added = HessianOperator(model, batches=[{**rows, "num_items_in_batch": torch.tensor(3)}]).point()[0]
    assert added == pytest.approx(plain)


class _OwnLoss(nn.Module):
    """A classifier in the manner of transformers whose loss is not the mean over its labels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits, weight = self.layer(x), None
        if self.kind == "weighted":
            weight = torch.tensor([1.0, 4.0, 0.1], dtype=x.dtype)
        sums = "sum" if self.kind == "sum" else "mean"
        loss = nn.functional.cross_entropy(logits, labels, weight=weight, reduction=sums)
        if self.kind == "auxiliary":
            loss = loss + logits.softmax(1).mean(0).square().sum()
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", ["weighted", "sum", "auxiliary"])
def test_a_models_own_loss_that_is_no_mean_over_its_labels_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    model, batch = _OwnLoss(kind).double(), {"x": torch.randn(8, 4).double(), "labels": torch.arange(8) % 3}
    with pytest.raises(InputError, match="the model's own loss is not the mean over its labels"):
        HessianOperator(model, batches=_cut(batch, 4, 3, 1)).point()
    assert HessianOperator(model, batches=[batch]).point()[0] == pytest.approx(model(**batch).loss.item())
    assert HessianOperator(_OwnLoss("mean").double(), batches=_cut(batch, 4, 3, 1)).point()


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda mean, n: (mean * n, n), "it is a sum over terms"),
        (lambda mean, n: (mean, -1), "the mean of -1 terms"),
        (lambda mean, n: (mean, n + 0.5), "which is no number of terms"),
        (lambda mean, n: (n, mean), "a loss returns"),
        (lambda mean, n: (mean, n, n), "not 3 values"),
        (lambda mean, n: None, "a tensor; this is a NoneType"),
        (lambda mean, n: (mean + torch.rand(()).double(), n), "the loss is random"),
    ],
)
@pytest.mark.parametrize("products", ["exact", "differences"])
def test_what_a_loss_says_of_its_terms_is_looked_at(returned: Any, said: str, products: Any) -> None:
    model, batches = _two_batches()

    def loss(model: nn.Module, batch: Any) -> Any:
        return returned(nn.functional.cross_entropy(model(batch[0]), batch[1]), len(batch[1]))

    operator = HessianOperator(model, loss, batches, products=products)
    with pytest.raises(InputError, match=said):
        operator @ torch.ones(operator.dimension, dtype=torch.float64)


def test_a_loss_over_rows_together_that_tells_its_terms_is_taken() -> None:
    """A contrastive loss is no mean of its halves' losses, and no sum of them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    pairs = [(torch.randn(5, 4).double(), torch.randn(5, 4).double()) for _ in range(2)]

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        scores = model(batch[0]) @ model(batch[1]).T
        return nn.functional.cross_entropy(scores, torch.arange(len(scores))), len(scores)

    value = HessianOperator(model, loss, pairs).point()[0]
    assert value == pytest.approx(sum(float(loss(model, pair)[0].detach()) for pair in pairs) / 2)
