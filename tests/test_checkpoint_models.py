"""Models that take other labels than classes, and models that give back something else than a loss."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertModel,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from flatbench.errors import InputError
from flatbench.notebook.load import load_checkpoint
from tests.checkpoint_cases import (
    WORDS,
    bert,
    class_batches,
    cross_entropy,
    ids,
    loss,
    made,
    summed,
    token_batches,
)


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


def test_a_peft_folder_of_an_image_model_has_the_classes_of_its_head(tmp_path: Path) -> None:
    """The base in its folder has two, as transformers makes them; the adapter was saved with three."""
    shape: Any = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    ViTModel(ViTConfig(image_size=16, patch_size=4, **shape)).save_pretrained(tmp_path / "vit")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit", num_labels=3)
    options: Any = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 1])}
    with torch.no_grad():
        expected = float(adapted.eval()(**batch).loss)
    found = load_checkpoint(tmp_path / "adapter", [batch]).evaluate()
    assert found["train"]["loss"] == pytest.approx(expected, rel=1e-6)
