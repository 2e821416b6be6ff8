"""A checkpoint takes examples as a study does: named columns, checked cells, and what was taken is said."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizerFast,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from flatbench.errors import InputError
from flatbench.labels import IGNORED
from flatbench.notebook.checkpoint import Checkpoint
from flatbench.notebook.load import load_checkpoint
from tests.tasks.task_cases import bert_folder, gpt2_folder

BERT = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 40,
}
TEXTS = ["a good film", "bad", "not so bad at all", "good", "the film", "well, it is a film"]
PAIRS = [(text, other) for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(bert_folder(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer without a padding token."""
    return AutoTokenizer.from_pretrained(gpt2_folder(tmp_path_factory.mktemp("gpt2") / "it"))


def bert(kind: Any = BertForSequenceClassification, **config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {**BERT, "vocab_size": 200, "num_labels": 3, **config}
        model: nn.Module = kind(BertConfig(**options)).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def gpt2(kind: Any = GPT2LMHeadModel, **config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 64, "vocab_size": 257}
        ends = {"eos_token_id": 256, "bos_token_id": 256}
        model: nn.Module = kind(GPT2Config(**{**shape, **ends, **config})).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def loss(opened: Checkpoint) -> float:
    return opened.evaluate()[next(iter(opened.data))]["loss"]


def one_by_one(
    model: nn.Module, tokenizer: Any, texts: list[Any], labels: list[Any], dtype: Any = None
) -> float:
    """The mean of the losses of the examples, each by itself, without padding."""
    found = []
    for text, label in zip(texts, labels, strict=True):
        encoded = tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")
        with torch.no_grad():
            found.append(float(model(**encoded, labels=torch.tensor([label], dtype=dtype)).loss))
    return sum(found) / len(found)


LABELS = [0, 2, 1, 0, 2, 1]
ROWS = [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS, strict=True)]
ENTAILMENT = [
    {"uid": f"n{i}", "premise": a, "hypothesis": b, "label": label}
    for i, ((a, b), label) in enumerate(zip(PAIRS, LABELS, strict=True))
]


# -- columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["list", "pandas", "datasets", "dict", "arrow", "nullable", "torch"])
def test_examples_of_every_layout_have_the_loss_of_a_plain_loop(tokenizer: Any, layout: str) -> None:
    table = datasets.Dataset.from_list(ROWS)
    made: dict[str, Any] = {
        "list": ROWS,
        "pandas": pd.DataFrame(ROWS),
        "datasets": table,
        "dict": datasets.DatasetDict({"train": table, "test": table.select([0, 1])}),
        "arrow": table.data.table,
        "nullable": pd.DataFrame(ROWS).convert_dtypes(),
        "torch": table.with_format("torch"),
    }
    model = bert()
    opened = load_checkpoint(model, made[layout], tokenizer=tokenizer)
    assert loss(opened) == pytest.approx(one_by_one(model, tokenizer, TEXTS, LABELS), abs=1e-10)
    assert opened.describe()["data" if layout == "dict" else "data, train"] == "inputs text; label label"
    if layout == "dict":
        assert opened.describe()["examples"] == "train 6, test 2"


def test_a_column_of_ids_is_no_sentence(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    with pytest.raises(InputError, match=r"which of the columns uid, premise, hypothesis .*text_columns="):
        load_checkpoint(model, ENTAILMENT, tokenizer=tokenizer)
    with caplog.at_level(logging.INFO, "flatbench"):
        opened = load_checkpoint(
            model, ENTAILMENT, tokenizer=tokenizer, text_columns=["premise", "hypothesis"]
        )
    assert loss(opened) == pytest.approx(one_by_one(model, tokenizer, PAIRS, LABELS), abs=1e-10)
    told = "inputs premise, hypothesis; label label; not used: uid"
    assert opened.describe()["data, train"] == told
    assert told in repr(opened)
    assert told in caplog.text


def test_pairs_known_by_their_names_and_columns_of_other_names(tokenizer: Any) -> None:
    model = bert()
    expected = one_by_one(model, tokenizer, PAIRS, LABELS)
    known = [{k: v for k, v in row.items() if k != "uid"} | {"idx": i} for i, row in enumerate(ENTAILMENT)]
    opened = load_checkpoint(model, known, tokenizer=tokenizer)
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    assert opened.describe()["data, train"].endswith("not used: idx")
    other = [{"a": r["premise"], "b": r["hypothesis"], "gold": r["label"]} for r in ENTAILMENT]
    with pytest.raises(InputError, match=r"without a label \(a, b, gold\); name it with label_column="):
        load_checkpoint(model, other, tokenizer=tokenizer)
    opened = load_checkpoint(model, other, tokenizer=tokenizer, text_columns=("a", "b"), label_column="gold")
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    for options, message in (
        (
            {"text_columns": "c", "label_column": "gold"},
            r"text_columns: data: train: no column 'c'; it has a, b, gold",
        ),
        ({"text_columns": "a", "label_column": "c"}, "label_column: data: train: no column 'c'"),
        ({"text_columns": ["a", "b", "gold"], "label_column": "gold"}, "3 columns; give one"),
    ):
        with pytest.raises(InputError, match=message):
            load_checkpoint(model, other, tokenizer=tokenizer, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a1", "label": 1}], r"which of the columns id"),
        ([{"title": "x", "review": "y", "label": 1}], "which of the columns title, review"),
        ([{"id": "0", "tokens": ["EU", "it"], "label": 1}], "which of the columns id"),
        ([{"text": "x", "label": 1, "labels": 0}], "columns 'labels' and 'label'; say which"),
        (pd.DataFrame([["x", "y", 1]], columns=["text", "text", "label"]), "'text' is there more than once"),
        ([{"text": "x", "label": 1}, {"label": 1}], r"row 1: column 'text' is empty"),
        ([{"text": "x", "label": 1}, {"text": "y"}], r"row 1: column 'label': the label is missing"),
        ([{"text": "x", "label": 1}, ["y", 1]], "row 1: a list among mappings"),
        ({"text": ["x", "y"], "label": [0, 1]}, "a batch is a mapping of tensors"),
        ({"input_ids": torch.ones(2, 3).long()}, "a mapping is of splits"),
    ],
)
def test_what_cannot_be_told_is_refused(tokenizer: Any, rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_checkpoint(bert(), rows, tokenizer=tokenizer)


def test_columns_of_batches_cannot_be_named() -> None:
    batch = {"input_ids": torch.ones(2, 3).long(), "labels": torch.tensor([0, 1])}
    with pytest.raises(InputError, match="these are batches"):
        load_checkpoint(bert(), [batch], text_columns="text")


# -- labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("positive", r"row 2: column 'label': the label is the text 'positive'.*labels="),
        (None, "row 2: column 'label': the label is missing"),
        (float("nan"), "row 2: column 'label': the label is missing"),
        (pd.NA, "row 2: column 'label': the label is missing"),
        (-1, r"row 2: column 'label': label -1: the model's classes are 0 to 2; -1 is what"),
        (3, "label 3: the model's classes are 0 to 2"),
        (0.5, r"0\.5 is no class"),
        ([0, 1, 1], "multi_label_classification"),
        ({"a": 1}, "is no number"),
    ],
)
@pytest.mark.parametrize("frame", [False, True])
def test_labels_that_are_none(tokenizer: Any, label: Any, message: str, frame: bool) -> None:
    rows = [*ROWS[:2], {"text": "x", "label": label}]
    with pytest.raises(InputError, match=message):
        load_checkpoint(bert(), pd.DataFrame(rows).astype(object) if frame else rows, tokenizer=tokenizer)


def test_nullable_columns(tokenizer: Any) -> None:
    frame = pd.DataFrame({"text": TEXTS, "label": LABELS}).astype({"text": "string", "label": "Int64"})
    model = bert()
    expected = one_by_one(model, tokenizer, TEXTS, LABELS)
    assert loss(load_checkpoint(model, frame, tokenizer=tokenizer)) == pytest.approx(expected, abs=1e-10)
    for column in ("text", "label"):
        broken = frame.copy()
        broken.loc[3, column] = pd.NA
        with pytest.raises(InputError, match=f"row 3: column '{column}'"):
            load_checkpoint(model, broken, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["named", "model", "category", "features", "reversed"])
def test_labels_by_name(tokenizer: Any, kind: str) -> None:
    names = ["no", "yes", "so"]
    order = names[::-1] if kind == "reversed" else names
    said = [
        order.index(names[label]) if kind in ("features", "reversed") else names[label] for label in LABELS
    ]
    config = {} if kind in ("named", "category") else {"id2label": dict(enumerate(["No", "yes", "so"]))}
    if kind == "model":
        config = {"id2label": dict(enumerate(names))}
    model = bert(**config)
    frame = pd.DataFrame({"text": TEXTS, "label": said})
    source: Any = frame
    if kind == "category":
        source = frame.astype({"label": "category"})
    if kind in ("features", "reversed"):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=order)}
        )
        source = datasets.Dataset.from_pandas(frame, features=features)
    named = names if kind in ("named", "category") else None
    opened = load_checkpoint(model, source, tokenizer=tokenizer, labels=named)
    assert loss(opened) == pytest.approx(one_by_one(model, tokenizer, TEXTS, LABELS), abs=1e-10)


def test_classes_that_only_partly_agree_are_refused(tokenizer: Any) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "other"])}
    )
    source = datasets.Dataset.from_list([{"text": "x", "label": 1}], features=features)
    model = bert(id2label={0: "no", 1: "yes", 2: "so"})
    with pytest.raises(InputError, match=r"classes are yes, other, the model's no, yes, so"):
        load_checkpoint(model, source, tokenizer=tokenizer)
    other = bert(id2label={0: "a", 1: "b", 2: "c"})
    told = load_checkpoint(other, source, tokenizer=tokenizer).describe()["data, train"]
    assert "labels by number (data: yes, other; model: a, b, c)" in told


@pytest.mark.parametrize("kind", [bool, np.bool_, np.int8, float])
def test_labels_of_other_types(tokenizer: Any, kind: Any) -> None:
    marks = [0, 1, 1, 0, 1, 0]
    rows = [{"text": text, "label": kind(mark)} for text, mark in zip(TEXTS, marks, strict=True)]
    model = bert(num_labels=2)
    opened = load_checkpoint(model, rows, tokenizer=tokenizer)
    assert loss(opened) == pytest.approx(one_by_one(model, tokenizer, TEXTS, marks), abs=1e-10)


@pytest.mark.parametrize("scores", [[0.5, 2.0, 1.5, 0.0, 3.0, 1.0], [0, 2, 1, 0, 3, 1]])
def test_scores(tokenizer: Any, scores: list[float]) -> None:
    model = bert(num_labels=1)
    rows = [{"text": text, "label": score} for text, score in zip(TEXTS, scores, strict=True)]
    opened = load_checkpoint(model, rows, tokenizer=tokenizer)
    expected = one_by_one(model, tokenizer, TEXTS, scores, torch.float64)
    assert opened.evaluate() == {"train": {"loss": pytest.approx(expected, abs=1e-10)}}  # and no accuracy
    assert opened.sharpness(cached=False, rho=0.01)["sharpness"] > 0
    with pytest.raises(InputError, match="'good' is no number"):
        load_checkpoint(model, [{"text": "x", "label": "good"}], tokenizer=tokenizer)


def test_several_classes_an_example(tokenizer: Any) -> None:
    model = bert(problem_type="multi_label_classification")
    marks = [[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    rows = [{"text": text, "labels": mark} for text, mark in zip(TEXTS, marks, strict=True)]
    opened = load_checkpoint(model, rows, tokenizer=tokenizer)
    expected = one_by_one(model, tokenizer, TEXTS, marks, torch.float64)
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    for label, message in ((1, "a label for each class"), ([1, 0], "wants 3 numbers")):
        with pytest.raises(InputError, match=message):
            load_checkpoint(model, [{"text": "x", "labels": label}], tokenizer=tokenizer)


# -- tokens -----------------------------------------------------------------------------------------------


def state(tokenizer: Any) -> tuple[Any, ...]:
    backend = tokenizer.backend_tokenizer
    return (backend.to_str(), tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padding", [None, 256, 5])
def test_a_tokenizer_without_padding_token_is_left_as_it_is(
    endless: Any, side: str, padding: int | None
) -> None:
    mine = copy.deepcopy(endless)
    mine.padding_side = side
    before = state(mine)
    model = gpt2()
    opened = load_checkpoint(model, [{"text": text} for text in TEXTS], tokenizer=mine)
    assert state(mine) == before
    total, terms = 0.0, 0
    for text in TEXTS:
        ids = endless(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            terms += ids.shape[1] - 1
    assert loss(opened) == pytest.approx(total / terms, abs=1e-6)  # GPT-2 computes its loss in float32
    classifier = gpt2(GPT2ForSequenceClassification, num_labels=3, pad_token_id=padding)
    if padding is None:
        with pytest.raises(InputError, match=r"set model\.config\.pad_token_id"):
            load_checkpoint(classifier, ROWS, tokenizer=mine)
        return
    opened = load_checkpoint(classifier, ROWS, tokenizer=mine)
    expected = one_by_one(classifier, endless, TEXTS, LABELS)
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    assert state(mine) == before


def test_a_slow_and_a_fast_tokenizer(tmp_path: Path) -> None:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    folder = bert_folder(tmp_path)
    model = bert()
    fast = BertTokenizerFast.from_pretrained(str(folder))
    slow = BertTokenizerLegacy(str(folder / "vocab.txt"))
    assert not slow.is_fast
    found = {loss(load_checkpoint(model, ROWS, tokenizer=each)) for each in (fast, slow)}
    assert len(found) == 1


def test_texts_that_are_too_long_are_cut_and_counted(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = bert()
    rows = [*ROWS, {"text": "long " * 12, "label": 0}]
    opened = load_checkpoint(model, rows, tokenizer=tokenizer)
    assert "1 of 7 texts were cut to 40 tokens" in opened.describe()["data, train"]
    assert [r.levelname for r in caplog.records if "were cut" in r.message] == ["WARNING"]
    assert opened.data["train"][0]["input_ids"].shape == (7, 40)
    opened = load_checkpoint(model, rows, tokenizer=tokenizer, max_length=8)
    expected = tokenizer("long " * 12, truncation=True, max_length=8)["input_ids"]
    assert opened.data["train"][0]["input_ids"][6].tolist() == expected
    with pytest.raises(InputError, match="max_length: 99 is more than the model's 40 positions"):
        load_checkpoint(model, rows, tokenizer=tokenizer, max_length=99)
    ids = [{"input_ids": list(range(5, 50)), "label": 0}]
    with pytest.raises(InputError, match=r"row 0: column 'input_ids': 45 tokens, more than the model's 40"):
        load_checkpoint(model, ids)
    with pytest.raises(InputError, match=r"row 0: column 'input_ids': token 900; the model has 200 tokens"):
        load_checkpoint(model, [{"input_ids": [5, 900], "label": 0}])
    batch = {"input_ids": torch.full((2, 50), 5), "labels": torch.tensor([0, 1])}
    with pytest.raises(InputError, match=r"batch 0: 'input_ids': 50 tokens"):
        load_checkpoint(model, [batch])


@pytest.mark.parametrize("form", ["lists", "arrays", "tensors", "mapped", "masked"])
def test_tokenised_examples_need_no_tokenizer(tokenizer: Any, form: str) -> None:
    model = bert()
    rows: list[Any] = [{**tokenizer(row["text"]), "label": row["label"]} for row in ROWS]
    source: Any = rows
    if form == "lists":
        source = [{"input_ids": row["input_ids"], "label": row["label"]} for row in rows]
    elif form == "arrays":
        source = [{k: np.asarray(v) for k, v in row.items()} for row in rows]
    elif form == "tensors":
        source = [{k: torch.tensor(v) for k, v in row.items()} for row in rows]
    elif form == "mapped":
        table = datasets.Dataset.from_list([{**row, "sentence": "an id", "idx": 3} for row in rows])
        source = table.with_format("torch")
    opened = load_checkpoint(model, source)
    assert loss(opened) == pytest.approx(one_by_one(model, tokenizer, TEXTS, LABELS), abs=1e-10)
    if form == "mapped":
        assert opened.describe()["data, train"].endswith("not used: sentence, idx")


@pytest.mark.parametrize("form", ["lists", "tensors"])
def test_labels_of_a_language_models_tokens_are_kept(form: str) -> None:
    model = gpt2()
    rows: list[Any] = [
        {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]},
        {"input_ids": [9, 4], "labels": [IGNORED, 4]},
    ]
    if form == "tensors":
        rows = [{k: torch.tensor(v) for k, v in row.items()} for row in rows]
    opened = load_checkpoint(model, rows)
    assert opened.data["train"][0]["labels"].tolist() == [
        [IGNORED, IGNORED, 7, 8],
        [IGNORED, 4, IGNORED, IGNORED],
    ]
    total = 0.0
    with torch.no_grad():
        for ids, places in (([5, 6, 7, 8], (2, 3)), ([9, 4], (1,))):
            logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(float(logits[place - 1, ids[place]]) for place in places)
    assert loss(opened) == pytest.approx(total / 3, abs=1e-6)
    with pytest.raises(InputError, match="1 labels for 2 tokens"):
        load_checkpoint(model, [{"input_ids": [5, 6], "labels": [5]}])


def test_a_class_of_each_token(tokenizer: Any) -> None:
    model = bert(BertForTokenClassification)
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [0, 1, IGNORED, 2]},
        {"input_ids": [9, 4], "labels": [2, IGNORED]},
        {"input_ids": [9, 4, 8], "labels": [1, 1, 1]},
    ]
    opened = load_checkpoint(model, rows)
    total = 0.0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            total -= sum(float(logits[i, x]) for i, x in enumerate(row["labels"]) if x != IGNORED)
    assert loss(opened) == pytest.approx(total / 7, abs=1e-10)
    for bad, message in (
        ({"text": "x y", "labels": 1}, "a label for each token: give examples with input_ids"),
        ({"tokens": ["x", "y"], "ner_tags": [0, 1]}, "a label for each token: give examples with input_ids"),
        ({"input_ids": [5, 6], "labels": 1}, "a label for each token"),
        ({"input_ids": [5, 6], "labels": [0, 3]}, "label 3: the model's classes are 0 to 2"),
    ):
        with pytest.raises(InputError, match=message):
            load_checkpoint(model, [bad], tokenizer=tokenizer)


def test_an_encoder_decoder_with_labels_of_its_own_length() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    config = T5Config(decoder_start_token_id=0, pad_token_id=0, **shape)
    model = T5ForConditionalGeneration(config).double().eval()
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [5, 9], "labels": [3, 4, 5, 6]}]
    opened = load_checkpoint(model, rows)
    with torch.no_grad():
        losses = [float(model(**{k: torch.tensor([v]) for k, v in row.items()}).loss) for row in rows]
    assert loss(opened) == pytest.approx((2 * losses[0] + 4 * losses[1]) / 6, abs=1e-6)
    with pytest.raises(InputError, match="a label for each token: give examples with input_ids and labels"):
        load_checkpoint(model, [{"document": "x", "summary": "y"}], text_columns="document")


# -- other inputs -----------------------------------------------------------------------------------------


def vit() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **shape)
    return ViTForImageClassification(config).double().eval()


@pytest.mark.parametrize("form", ["tensors", "arrays", "lists", "loader", "map"])
def test_images(form: str) -> None:
    torch.manual_seed(1)
    pixels, labels = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    model = vit()
    rows: list[Any] = [{"pixel_values": p, "label": int(y)} for p, y in zip(pixels, labels, strict=True)]
    source: Any = rows
    if form == "arrays":
        source = [{**row, "pixel_values": row["pixel_values"].numpy()} for row in rows]
    elif form == "lists":
        source = [{**row, "pixel_values": row["pixel_values"].tolist(), "file": "x.png"} for row in rows]
    elif form == "loader":
        named = [{"pixel_values": p, "label": y, "file": "x"} for p, y in zip(pixels, labels, strict=True)]
        source = DataLoader(named, batch_size=2)
    elif form == "map":
        source = rows[:]
    with torch.no_grad():
        expected = float(model(pixel_values=pixels, labels=labels).loss)
    assert loss(load_checkpoint(model, source)) == pytest.approx(expected, abs=1e-10)


def test_images_that_no_processor_has_seen() -> None:
    from PIL import Image

    with pytest.raises(InputError, match="an image processor makes them"):
        load_checkpoint(vit(), [{"image": Image.new("L", (4, 4)), "label": 0}])


def test_pairs_of_one_example_each() -> None:
    torch.manual_seed(1)
    inputs, targets = torch.randn(40, 4), torch.randint(0, 3, (40,))
    model = nn.Linear(4, 3)
    expected = float(nn.functional.cross_entropy(model(inputs), targets))
    forms: tuple[Any, ...] = (
        TensorDataset(inputs, targets),
        [(x, int(y)) for x, y in zip(inputs, targets, strict=True)],
        [({"input": inputs[:30]}, targets[:30]), ({"input": inputs[30:]}, targets[30:])],
    )
    for form in forms:
        opened = load_checkpoint(model, form, loss=nn.functional.cross_entropy)
        assert loss(opened) == pytest.approx(expected, rel=1e-5)


def test_batches_are_checked_too() -> None:
    ids = torch.full((2, 4), 5)
    for labels, message in (
        (torch.tensor([0, 3]), "label 3: the model's classes are 0 to 2"),
        (torch.tensor([0, -1]), "label -1"),
        (torch.tensor([0.0, 1.0]), "classes are whole numbers"),
        (torch.tensor([0, 1, 1]), "different numbers of rows"),
    ):
        with pytest.raises(InputError, match=message):
            load_checkpoint(bert(), [{"input_ids": ids, "labels": labels}])
    spans = {"start_positions": torch.tensor([0, -1]), "end_positions": torch.tensor([1, 2])}
    with pytest.raises(InputError, match="start_positions -1"):
        load_checkpoint(bert(BertForQuestionAnswering), [{"input_ids": ids, **spans}])
    extra: dict[str, Any] = {"input_ids": ids, "label": torch.tensor([0, 1]), "text": ["a", "b"]}
    opened = load_checkpoint(bert(), [extra])
    assert opened.describe()["data, train"] == "inputs input_ids; label labels; not used: text"


def test_numbers_of_the_whole(tokenizer: Any) -> None:
    model = bert()
    rows = ROWS * 12  # three batches, the last one smaller
    opened = load_checkpoint(model, rows, tokenizer=tokenizer)
    expected = one_by_one(model, tokenizer, TEXTS, LABELS)
    assert loss(opened) == pytest.approx(expected, abs=1e-10)
    lengths: list[Tensor] = [batch["labels"] for batch in opened.data["train"]]
    assert list(map(len, lengths)) == [32, 32, 8]


@pytest.mark.parametrize("form", ["stream", "transform", "numbered", "iterable"])
def test_sources_of_other_habits(tokenizer: Any, form: str) -> None:
    table = datasets.Dataset.from_list(ROWS)
    source: Any = table.to_iterable_dataset()
    options: dict[str, Any] = {}
    if form == "transform":
        source = table.with_transform(lambda rows: {**tokenizer(rows["text"]), "labels": rows["label"]})
    elif form == "numbered":  # a frame without a header
        source = pd.DataFrame([[row["text"], row["label"]] for row in ROWS])
        options = {"text_columns": "0", "label_column": "1"}
    elif form == "iterable":
        source = (row for row in ROWS)
    model = bert()
    opened = load_checkpoint(model, source, tokenizer=tokenizer, **options)
    assert loss(opened) == pytest.approx(one_by_one(model, tokenizer, TEXTS, LABELS), abs=1e-10)


def test_a_choice_among_several_texts() -> None:
    model = bert(BertForMultipleChoice)
    rows = [
        {"input_ids": [[5, 6, 7], [5, 8, 9]], "label": 1},
        {"input_ids": [[5, 6, 9], [5, 8, 4]], "label": 0},
    ]
    with torch.no_grad():
        each = [
            float(model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["label"]])).loss)
            for r in rows
        ]
    assert loss(load_checkpoint(model, rows)) == pytest.approx(sum(each) / 2, abs=1e-10)


def test_texts_with_a_loss_of_ones_own_for_a_language_model(endless: Any) -> None:
    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    rows = [{"text": text, "label": 0} for text in TEXTS]
    found = [load_checkpoint(gpt2(), rows, tokenizer=endless, loss=given) for given in (None, criterion)]
    assert loss(found[0]) == pytest.approx(loss(found[1]), abs=1e-6)
    assert found[0].taken["data, train"].startswith("inputs text; not used: label")


def test_names_that_make_no_sense(tokenizer: Any) -> None:
    for options, message in (
        ({"labels": {0: "a", 1: "b", 2: "c"}}, "a list of names in the model's order"),
        ({"labels": ["a", "b"]}, "2 names, but the model has 3 classes"),
        ({"max_length": 0}, "max_length: 0"),
    ):
        with pytest.raises(InputError, match=message):
            load_checkpoint(bert(), ROWS, tokenizer=tokenizer, **options)
    spans = [{"input_ids": [5, 6], "start_positions": 0, "end_positions": 1, "label": 1}]
    with pytest.raises(InputError, match="the model predicts a span"):
        load_checkpoint(bert(BertForQuestionAnswering), spans, label_column="label")
    with pytest.raises(InputError, match=r"a pair: \[\(inputs, targets\)\]"):
        load_checkpoint(nn.Linear(2, 2), (torch.ones(3, 2), torch.ones(3)), loss=nn.functional.mse_loss)
