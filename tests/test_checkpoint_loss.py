"""A checkpoint's loss is a mean over terms, whatever the model gives back; that is checked, not assumed."""

from __future__ import annotations

import copy
import functools
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from flatbench.curvature import HessianOperator
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.labels import IGNORED
from flatbench.models.factors import adapted_modules
from flatbench.notebook.checkpoint import Checkpoint
from flatbench.notebook.load import load_checkpoint
from flatbench.subject.objective import Objective
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import same, snapshot

WORDS = 19
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
cross_entropy = nn.functional.cross_entropy


def made(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = kind(config).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def bert(kind: Any = BertForSequenceClassification, **config: Any) -> nn.Module:
    return made(kind, BertConfig(**{**BERT, **config}))


def gpt2(**config: Any) -> nn.Module:
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": WORDS}
    return made(GPT2LMHeadModel, GPT2Config(bos_token_id=0, eos_token_id=0, **shape, **config))


def ids(*lengths: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, WORDS, mask.shape, generator=generator) * mask, mask


def token_batches(share: float = 0.5) -> list[dict[str, Tensor]]:
    """Ragged batches with labels of some tokens."""
    found = []
    for lengths in ((5, 9, 3), (8, 2), (4, 4, 9, 7)):
        tokens, mask = ids(*lengths)
        generator = torch.Generator().manual_seed(len(lengths))
        kept = (torch.rand(tokens.shape, generator=generator) < share) & (mask > 0)
        kept[:, 1] = True
        labels = tokens.masked_fill(~kept, IGNORED)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def loss(opened: Checkpoint) -> float:
    return opened.evaluate()["train"]["loss"]


def summed(model: nn.Module, batches: list[dict[str, Tensor]], shifted: bool) -> float:
    """The mean over all tokens with labels, token by token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch["labels"])):
                length = int(batch["attention_mask"][row].sum())
                found: Any = model(input_ids=batch["input_ids"][row : row + 1, :length])
                logits = getattr(found, "logits", found)[0].log_softmax(-1)
                for place, label in enumerate(batch["labels"][row, :length].tolist()):
                    if label != IGNORED and (place or not shifted):
                        total -= float(logits[place - shifted, label])
                        count += 1
    return total / count


# -- models that take other labels ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "distilbert", "lora"])
@pytest.mark.parametrize("examples", [False, True])
def test_question_answering(kind: str, examples: bool) -> None:
    if kind == "distilbert":
        shape = {"vocab_size": WORDS, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
        model = made(DistilBertForQuestionAnswering, DistilBertConfig(max_position_embeddings=16, **shape))
    else:
        model = bert(BertForQuestionAnswering)
    if kind == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])).double().eval()
    rows = []
    for length, start, end in ((5, 1, 2), (9, 4, 8), (3, 0, 0), (7, 2, 2), (4, 1, 3)):
        row = ids(length)[0][0]
        rows.append({"input_ids": row.tolist(), "start_positions": start, "end_positions": end})
    data: Any = rows
    if not examples:
        data = []
        for part in (rows[:3], rows[3:]):
            width = max(len(r["input_ids"]) for r in part)  # type: ignore[arg-type]
            tokens = [r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in part]  # type: ignore[operator,arg-type]
            batch = {"input_ids": torch.tensor(tokens)}
            batch["attention_mask"] = (batch["input_ids"] > 0).long()
            data.append(
                batch | {k: torch.tensor([r[k] for r in part]) for k in ("start_positions", "end_positions")}
            )
    opened = load_checkpoint(
        model, data, target_modules=() if kind == "lora" else ["lin1"] * (kind == "distilbert")
    )
    ones = [{k: torch.tensor([v]) for k, v in row.items()} for row in rows]
    if not examples:  # these models read padding: the number is that of the batches as they are padded
        ones = [
            {k: v[i : i + 1] for k, v in batch.items()}
            for batch in data
            for i in range(len(batch["input_ids"]))
        ]
    with torch.no_grad():
        each = [float(model(**one).loss) for one in ones]
    assert loss(opened) == pytest.approx(sum(each) / len(each), abs=1e-10)
    told = "mean over examples with a span"
    assert opened.taken["loss"] == (told if examples else f"{told}; it depends on the padding of the batches")
    assert opened.hessian(cached=False, space=opened.space)["eigenvalue_1"] > 0
    assert opened.sharpness(cached=False, space=opened.space)["sharpness"] > 0


def test_raw_questions_are_refused_by_name() -> None:
    squad = {"id": "5", "title": "x", "context": "a b", "question": "c", "answers": {"text": ["a"]}}
    with pytest.raises(InputError, match="a span of the text: give examples with input_ids, start_positions"):
        load_checkpoint(bert(BertForQuestionAnswering), [squad])
    tokens, mask = ids(3, 3)
    spans = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1, 9])}
    with pytest.raises(InputError, match="half a term"):
        load_checkpoint(
            bert(BertForQuestionAnswering), [{"input_ids": tokens, "attention_mask": mask, **spans}]
        )


def mae() -> nn.Module:
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "mask_ratio": 0.5}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    more = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return made(ViTMAEForPreTraining, ViTMAEConfig(decoder_intermediate_size=8, **shape, **sizes, **more))


@pytest.mark.parametrize("form", ["batches", "examples", "own noise"])
def test_a_masked_autoencoder_hides_the_same_patches_in_each_pass(form: str) -> None:
    torch.manual_seed(3)
    model = mae()
    pixels = [torch.randn(n, 1, 8, 8, dtype=torch.float64) for n in (4, 3)]
    data: Any = [{"pixel_values": p} for p in pixels]
    if form == "examples":
        data = [{"pixel_values": image.numpy()} for p in pixels for image in p]
    if form == "own noise":
        data = [{**batch, "noise": torch.rand(len(batch["pixel_values"]), 16)} for batch in data]
    opened, again, other = (load_checkpoint(model, data, seed=seed) for seed in (0, 0, 1))
    assert loss(opened) == loss(opened) == loss(again)
    assert (loss(opened) == loss(other)) == (form == "own noise")
    assert ("masks drawn once" in opened.describe()["data, train"]) == (form != "own noise")
    total = 0.0
    with torch.no_grad():
        for batch in opened.data["train"]:
            for row in range(len(batch["noise"])):
                total += float(model(**{k: v[row : row + 1] for k, v in batch.items()}).loss)
    assert loss(opened) == pytest.approx(total / 7, abs=1e-10)
    assert opened.sharpness(cached=False)["sharpness"] > 0


def test_masked_image_modelling_counts_its_masked_patches() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = made(
        ViTForMaskedImageModeling,
        ViTConfig(image_size=4, patch_size=2, num_channels=1, encoder_stride=2, **sizes),
    )
    torch.manual_seed(0)
    masks = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    batch = {"pixel_values": torch.randn(3, 1, 4, 4, dtype=torch.float64), "bool_masked_pos": masks}
    opened = load_checkpoint(model, [batch])
    assert opened.taken["loss"] == "mean over masked patches"
    whole = [{k: v[rows] for k, v in batch.items()} for rows in ([0, 1], [2])]
    assert loss(load_checkpoint(model, whole)) == pytest.approx(loss(opened), rel=1e-4)


class Drawing(nn.Module):
    """A model that draws noise in evaluation mode too, as variational autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layer(inputs + torch.randn_like(inputs))
        return found


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    model, data = Drawing(), [(torch.randn(5, 4), torch.randint(0, 3, (5,)))]
    state = torch.get_rng_state()
    with pytest.raises(InputError, match="two passes over the same rows"):
        load_checkpoint(model, data, loss=cross_entropy)
    assert torch.equal(torch.get_rng_state(), state)


# -- models that give back something else -----------------------------------------------------------------


class Shaped(nn.Module):
    """A classifier that gives its logits, and its loss where it gets labels, in some form."""

    def __init__(self, form: Callable[[Tensor, Tensor | None], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.form = nn.Linear(4, 3).double(), form

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(inputs)
        return self.form(logits, None if labels is None else cross_entropy(logits, labels))


Pair = namedtuple("Pair", ["logits", "loss"])
FORMS: dict[str, Callable[[Tensor, Tensor | None], Any]] = {
    "loss first": lambda logits, loss: (loss, logits) if loss is not None else (logits,),
    "loss last": lambda logits, loss: (logits, loss),
    "dict": lambda logits, loss: {"loss": loss, "logits": logits},
    "named": Pair,
    "loss alone": lambda logits, loss: logits if loss is None else loss,
    "object": lambda logits, loss: SimpleNamespace(loss=loss, logits=logits),
}


def class_batches(label: str = "labels") -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return [
        {"inputs": torch.randn(n, 4, dtype=torch.float64), label: torch.randint(0, 3, (n,))}
        for n in (5, 5, 2)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_what_the_model_gives_back(form: str) -> None:
    model, batches = Shaped(FORMS[form]), class_batches()
    inputs, labels = (torch.cat([b[k] for b in batches]) for k in ("inputs", "labels"))
    logits = model.body(inputs)
    expected = float(cross_entropy(logits, labels))
    opened = load_checkpoint(model, batches)
    found = opened.evaluate()["train"]
    assert found["loss"] == pytest.approx(expected, abs=1e-10)
    if form in ("dict", "named", "object"):
        assert found["accuracy"] == float((logits.argmax(-1) == labels).double().mean())
    else:
        assert set(found) == {"loss"}  # which of a tuple are the logits, nobody says
    assert opened.hessian(cached=False, space="all")["eigenvalue_1"] > 0


@pytest.mark.parametrize("form", ["loss first", "loss last", "dict"])
@pytest.mark.parametrize("says", [False, True])
def test_a_loss_that_unpacks_it(form: str, says: bool) -> None:
    def criterion(outputs: Any, targets: Tensor) -> Any:
        found = cross_entropy(outputs["logits"] if isinstance(outputs, dict) else outputs[0], targets)
        return (found, len(targets)) if says else found

    model, batches = Shaped(FORMS[form]), class_batches("targets")
    opened = load_checkpoint(model, batches, loss=criterion)
    logits = model.body(torch.cat([b["inputs"] for b in batches]))
    expected = float(cross_entropy(logits, torch.cat([b["targets"] for b in batches])))
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    assert opened.landscape(points=3, space="all", cached=False).loss == pytest.approx(expected, abs=1e-10)


def test_the_tuples_of_transformers() -> None:
    batches = token_batches(1.0)
    model = bert(BertForMaskedLM)
    expected = loss(load_checkpoint(model, batches))
    model.config.return_dict = False
    opened = load_checkpoint(model, batches)
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    assert expected == pytest.approx(summed(bert(BertForMaskedLM), batches, False), abs=1e-10)


def test_no_loss_is_answered_with_a_hint() -> None:
    pairs = [(torch.randn(5, 4), torch.randint(0, 3, (5,)))]
    hint = r"give loss=, for example loss=torch\.nn\.functional\.cross_entropy"
    with pytest.raises(InputError, match=hint):
        load_checkpoint(nn.Sequential(nn.Linear(4, 3)), pairs)
    named = [{"input": torch.randn(5, 4), "labels": torch.randint(0, 3, (5,))}]
    with pytest.raises(InputError, match=hint):
        load_checkpoint(nn.Sequential(nn.Linear(4, 3)), named)
    with pytest.raises(InputError, match=hint):
        load_checkpoint(bert(BertModel), [{"input_ids": ids(4, 3)[0], "labels": torch.tensor([0, 1])}])
    with pytest.raises(InputError, match=r"loss=: fails on what the model gives back \(a tuple with 0, 1\)"):
        load_checkpoint(Shaped(FORMS["loss last"]).float(), pairs, loss=cross_entropy)
    with pytest.raises(InputError, match=r"the model rejects a batch \(inputs \(2, 9\), targets \(2,\)\)"):
        load_checkpoint(nn.Linear(4, 3), [(torch.randn(5, 9), pairs[0][1])], loss=cross_entropy)


# -- terms ------------------------------------------------------------------------------------------------


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


# -- messages that name their cause -----------------------------------------------------------------------


def adapted() -> Any:
    torch.manual_seed(0)
    model = peft.get_peft_model(bert(BertForMaskedLM), peft.LoraConfig(r=2, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def mean_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, int((batch["labels"] != IGNORED).sum())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("merge_adapter", r"merged into the weights.*unmerge_adapter\(\)"),
        ("disable_adapter_layers", "disabled"),
    ],
)
def test_adapters_that_have_no_part_in_the_loss(change: str, message: str) -> None:
    model, batches = adapted(), token_batches()
    opened = load_checkpoint(model, batches)
    getattr(model, change)()
    for ask in (opened.hessian, opened.sharpness):
        with pytest.raises(InputError, match=f"depends on no parameter of the space 'adapter': .*{message}"):
            ask(space="adapter", cached=False)
    with pytest.raises(InputError, match=message):  # flat in silence before
        opened.landscape(space="adapter", points=3, cached=False)
    with (
        HessianOperator(model, mean_loss, batches, space="adapter") as operator,
        pytest.raises(FlatbenchError, match=f"no parameter of the space: .*{message}"),
    ):
        operator.point()


class Encoder(nn.Module):
    """torch's own encoder layer, which has a fused fast path in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(inputs).mean(1))
        return found


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear1"]])
def test_adapters_that_a_fused_fast_path_passes_over(targets: list[str]) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=targets)).eval()
    data = [(torch.randn(5, 3, 4), torch.randint(0, 3, (5,)))]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        passed_over = float(cross_entropy(model(data[0][0]), data[0][1]))
        torch.backends.mha.set_fastpath_enabled(False)
        trained = float(cross_entropy(model(data[0][0]), data[0][1]))
        torch.backends.mha.set_fastpath_enabled(True)
    assert abs(trained - passed_over) > 1e-3
    # measured is the function that was trained: in training the layers are called
    opened = load_checkpoint(model, data, loss=cross_entropy)
    with in_space(opened.subject(), "adapter") as point:
        loss, gradient = Objective(opened.subject(), point, None).gradient()
    assert loss == pytest.approx(trained, rel=1e-6)
    assert all(bool(g.any()) for g in gradient)
    assert torch.backends.mha.get_fastpath_enabled()
    assert "forward" not in vars(model.base_model.model.layer.linear1)


def test_what_peft_does_with_a_whole_attention_is_no_passing_over() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=["self_attn"])).eval()
    data = [(torch.randn(5, 3, 4), torch.randint(0, 3, (5,)))]
    load_checkpoint(model, data, loss=cross_entropy)
    # torch's attention reads this one without calling it in any mode
    out = peft.get_peft_model(Encoder(), peft.LoraConfig(r=2, target_modules=["out_proj"])).eval()
    with pytest.raises(InputError, match=r"out_proj.*passed over"):
        load_checkpoint(out, data, loss=cross_entropy)


@pytest.mark.slow  # torch.compile imports its compiler
def test_a_compiled_model_has_its_adapters() -> None:
    model, batches = adapted(), token_batches()
    expected = load_checkpoint(model, batches)
    compiled = load_checkpoint(torch.compile(model), batches)  # type: ignore[arg-type]
    assert compiled.model is model
    assert compiled.space == "merged"
    assert compiled.adapted == expected.adapted == ["bert.encoder.layer.0.attention.self.query"]
    for space in ("merged", "adapter"):
        values = [c.sharpness(space=space, cached=False)["sharpness"] for c in (expected, compiled)]
        assert values[0] == values[1] > 0
    # compiled in parts: names have the wrapper in their middle
    parts = adapted()
    layers = parts.base_model.model.bert.encoder.layer
    layers[0] = torch.compile(layers[0], backend="eager")
    opened = load_checkpoint(parts, batches)
    assert opened.adapted == expected.adapted
    with in_space(opened.subject(), "merged") as point:
        assert list(point.parameters) == ["bert.encoder.layer.0.attention.self.query.weight"]
    assert load_checkpoint(nn.DataParallel(model), batches).adapted == expected.adapted


def test_adapters_without_a_wrapper_around_the_model() -> None:
    model = bert(BertForMaskedLM)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    opened = load_checkpoint(model.double(), token_batches())
    assert opened.adapted == ["bert.encoder.layer.0.attention.self.query"]
    injected = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["query"]), copy.deepcopy(bert(BertForMaskedLM))
    )
    assert adapted_modules(injected, ()) == opened.adapted
    subject = Subject(model, token_batches(), mean_loss, (), 0)
    with (
        pytest.raises(NotApplicableError, match="no adapted modules are named, though the model has 1"),
        in_space(subject, "merged"),
    ):
        pass


def test_target_modules_that_are_not_there() -> None:
    model = bert(BertForMaskedLM)
    with pytest.raises(InputError, match="no module of the model is called q_proj"):
        load_checkpoint(model, token_batches(), target_modules=["q_proj"])
    with pytest.raises(InputError, match=r"give a list of names: \['query'\]"):
        load_checkpoint(model, token_batches(), target_modules="query")


# -- what is kept -----------------------------------------------------------------------------------------


def smoothed(share: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, targets: cross_entropy(outputs, targets, label_smoothing=share)


def test_results_of_another_loss_are_not_taken_from_the_cache() -> None:
    model, batches = nn.Linear(4, 3).double(), class_batches("targets")
    criteria: list[Any] = [
        cross_entropy,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        smoothed(0.3),
        smoothed(0.4),
        functools.partial(cross_entropy, label_smoothing=0.5),
        functools.partial(cross_entropy, label_smoothing=0.6),
        nn.functional.multi_margin_loss,
    ]
    opened = [load_checkpoint(model, batches, loss=criterion) for criterion in criteria]
    found = [c.sharpness()["sharpness"] for c in opened]
    assert found == [c.sharpness(cached=False)["sharpness"] for c in opened]
    assert len(set(found)) == len(found)
    losses = [c.landscape(points=3, space="all").loss for c in opened]
    assert losses == [c.landscape(points=3, space="all", cached=False).loss for c in opened]
    again = load_checkpoint(model, batches, loss=smoothed(0.3))
    assert again.sharpness().cached
    assert again.loss_key == opened[3].loss_key


def test_the_models_own_loss_is_known_by_its_configuration() -> None:
    torch.manual_seed(0)
    batch = {"input_ids": ids(4, 3)[0], "labels": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}
    model = bert(num_labels=2, problem_type="regression")
    first = load_checkpoint(model, [batch]).sharpness()["sharpness"]
    model.config.problem_type = "multi_label_classification"
    second = load_checkpoint(model, [batch])
    assert second.sharpness()["sharpness"] == second.sharpness(cached=False)["sharpness"] != first


def test_running_means_that_changed_are_seen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    opened = load_checkpoint(model, [(torch.randn(5, 4).double(), torch.arange(5) % 3)], loss=cross_entropy)
    first = opened.sharpness()
    model[0].running_mean.add_(1.0)
    second = opened.sharpness()
    assert not second.cached
    assert second["sharpness"] != first["sharpness"]
