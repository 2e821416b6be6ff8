"""The loss of a checkpoint is the mean over its terms, or is refused."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from flatbench.curvature import HessianOperator
from flatbench.errors import InputError
from flatbench.labels import IGNORED
from flatbench.notebook.load import load_checkpoint
from tests.checkpoint_cases import (
    WORDS,
    bert,
    class_batches,
    cross_entropy,
    gpt2,
    ids,
    loss,
    made,
    summed,
    token_batches,
)
from tests.measures.measure_cases import same, snapshot


def flat(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)


def flat_shifted(outputs: Tensor, targets: Tensor) -> Tensor:
    return flat(outputs[:, :-1], targets[:, 1:])


def counted(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return flat_shifted(outputs, targets), (targets[:, 1:] != IGNORED).sum()


@pytest.mark.parametrize("way", ["own", "loss", "shifted", "counted"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_mean_over_tokens_does_not_depend_on_batching(way: str, share: float) -> None:
    batches = token_batches(share)
    model = bert(BertForMaskedLM) if way in ("own", "loss") else gpt2()
    criterion: Any = {"own": None, "loss": flat, "shifted": flat_shifted, "counted": counted}[way]
    alone = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["labels"]))]
    expected = summed(model, batches, way in ("shifted", "counted"))
    assert loss(load_checkpoint(model, batches, loss=criterion)) == pytest.approx(expected, abs=1e-10)
    opened = load_checkpoint(model, alone, loss=criterion)
    if way != "shifted":  # of which rows by themselves cannot say how they count
        assert loss(opened) == pytest.approx(expected, abs=1e-10)


class Attended(nn.Module):
    """A loss of its own over all tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, 4).double(), nn.Linear(4, 1).double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        scores = self.head(self.words(input_ids))[..., 0]
        each = (scores - labels[:, None]).square() * attention_mask
        return {"loss": each.sum() / attention_mask.sum(), "scores": scores}


def test_a_mean_over_tokens_with_one_label_an_example() -> None:
    batches = [{**b, "labels": torch.arange(len(b["labels"])).double()} for b in token_batches()]
    model = Attended()
    opened = load_checkpoint(model, batches)
    assert opened.taken["loss"] == "mean over tokens"
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch["labels"])):
                one = {k: v[row : row + 1] for k, v in batch.items()}
                terms = int(one["attention_mask"].sum())
                total, count = total + float(model(**one)["loss"]) * terms, count + terms
    assert loss(opened) == pytest.approx(total / count, abs=1e-10)


def summing(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="sum")


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, torch.tensor([0.1, 5.0, 1.0], dtype=torch.float64))


def unreduced(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


def without_zero(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, ignore_index=0)


def without_two(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, ignore_index=2)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (summing, "the loss is a sum"),
        (weighted, "it is no mean over examples, labels or tokens"),
        (without_zero, "it is no mean over examples, labels or tokens"),
        (without_two, r"5 rows have the loss .*it is no mean over examples, labels or tokens"),
        (contrastive, "it is no mean over examples"),
        (unreduced, r"loss=: must be one number, the mean, not of shape \(2,\)"),
        (lambda outputs, targets: (cross_entropy(outputs, targets), 0.5), "terms is 0.5; it must be a whole"),
        (
            lambda outputs, targets: (cross_entropy(outputs, targets), len(targets) ** 2 + 1),
            "2 rows have 5 terms, and apart 2 and 2",
        ),
        (lambda outputs, targets: (1, 2, 3), "gives 3 values"),
        (lambda outputs, targets: 0.5, "a float, not a tensor"),
    ],
)
def test_losses_that_are_no_mean(criterion: Any, message: str) -> None:
    model, (first, *_) = nn.Linear(4, 3).double(), class_batches("targets")
    first["targets"] = torch.tensor([0, 1, 2, 1, 0])
    with pytest.raises(InputError, match=message):
        load_checkpoint(model, [first], loss=criterion)


@pytest.mark.parametrize("order", ["by class", "a rare class late"])
def test_weights_of_classes_are_found_wherever_the_class_is(order: str) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(160, 4, generator=generator, dtype=torch.float64)
    targets = torch.arange(160) * 3 // 160
    if order == "a rare class late":
        targets = torch.arange(160) % 2
        targets[146] = 2
    batches = [{"input": values[i : i + 32], "targets": targets[i : i + 32]} for i in range(0, 160, 32)]
    with pytest.raises(InputError, match="it is no mean over examples"):
        load_checkpoint(nn.Linear(4, 3).double(), batches, loss=weighted)


def test_a_sum_of_means_over_different_terms_is_refused() -> None:
    batches = [{**b, "next_sentence_label": torch.arange(len(b["labels"])) % 2} for b in token_batches()]
    with pytest.raises(InputError, match="depends on how examples are batched"):
        load_checkpoint(bert(BertForPreTraining), batches)


def test_opening_leaves_the_model_as_it_is() -> None:
    model = bert(BertForMaskedLM).train()
    before = snapshot(model)
    load_checkpoint(model, token_batches())
    assert same(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_coarse_models_open(dtype: torch.dtype) -> None:
    model = bert(BertForMaskedLM).to(dtype)
    assert loss(load_checkpoint(model, token_batches())) == pytest.approx(
        summed(bert(BertForMaskedLM), token_batches(), False), rel=0.05
    )


class NanoGPT(nn.Module):
    """Arguments and labels of names of its own, and -1 where no label counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(WORDS, 4).double(), nn.Linear(4, WORDS).double()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.head(self.words(idx))
        if targets is None:
            return logits, None
        return logits, cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1)


def test_labels_of_which_negative_ones_do_not_count() -> None:
    batches = [
        {"idx": b["input_ids"], "targets": b["labels"].masked_fill(b["labels"] < 0, -1)}
        for b in token_batches()
    ]
    model = NanoGPT()
    opened = load_checkpoint(model, batches)
    assert opened.taken["loss"] == "mean over labels that are not negative"
    total, count = 0.0, 0
    for batch in batches:
        kept = batch["targets"] >= 0
        each = cross_entropy(
            model.head(model.words(batch["idx"][kept])), batch["targets"][kept], reduction="sum"
        )
        total, count = total + float(each.detach()), count + int(kept.sum())
    assert loss(opened) == pytest.approx(total / count, abs=1e-10)
    with pytest.raises(InputError, match=r"takes no inputs, and computes no loss from these batches"):
        load_checkpoint(model, [(batches[0]["idx"], batches[0]["targets"])])


@pytest.mark.parametrize("ignored", [-100, -1])
def test_accuracy_is_of_the_labels_that_count(ignored: int) -> None:
    model = nn.Linear(3, 2).double()
    inputs = torch.randn(8, 3, dtype=torch.float64)
    labels = model(inputs).argmax(-1)
    labels[0] = 1 - labels[0]
    labels[4:] = ignored

    def mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, ignore_index=ignored)

    for size in (8, 3):
        batches = [*zip(inputs.split(size), labels.split(size), strict=True)]
        assert load_checkpoint(model, batches, loss=mean).evaluate()["train"]["accuracy"] == 0.75


def test_pictures_with_labels_for_their_places() -> None:
    shape = {"hidden_sizes": [8], "depths": [1], "sr_ratios": [1], "patch_sizes": [3], "strides": [2]}
    config = SegformerConfig(
        num_channels=1,
        num_encoder_blocks=1,
        num_attention_heads=[1],
        mlp_ratios=[1],
        decoder_hidden_size=8,
        **shape,
    )
    model = made(SegformerForSemanticSegmentation, config)
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (3, 8, 8))
    labels[0, :6] = labels[1, 2] = 255
    batch = {"pixel_values": torch.randn(3, 1, 8, 8, dtype=torch.float64), "labels": labels}
    opened = load_checkpoint(model, [{k: v[rows] for k, v in batch.items()} for rows in ([0, 1], [2])])
    assert opened.taken["loss"] == "mean over labels that are not 255"
    with torch.no_grad():
        assert loss(opened) == pytest.approx(float(model(**batch).loss), abs=1e-10)


def test_virtual_tokens_before_the_text_make_its_first_one_a_term() -> None:
    model = peft.get_peft_model(gpt2(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    opened = load_checkpoint(model.double().eval(), token_batches(1.0))
    assert opened.taken["loss"] == "mean over labels"


def test_curvature_says_that_labels_are_missing() -> None:
    spans = {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([1])}
    model = bert(BertForQuestionAnswering)
    with (
        pytest.raises(InputError, match=r"hold no 'labels'.*give loss="),
        HessianOperator(model, batches=[{"input_ids": ids(4)[0], **spans}]) as operator,
    ):
        operator.point()
