"""Few-shot classification by prompts: the loss, the few shots, every layout."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.seeding import derive_seed
from flatbench.tasks.common import few_shots
from flatbench.tasks.text import prompt_data
from flatbench.tasks.text.prompt_classification import PromptClassification
from tests.tasks.task_cases import WORDS, bert_folder, gpt2_folder, minilm, real, write_rte, write_tsv


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    folder = bert_folder(tmp_path_factory.mktemp("models") / "bert", BertForMaskedLM, WORDS)
    return PretrainedModel(name_or_path=str(folder))


def make(model: PretrainedModel, data: Path, task: Any = "rte", **options: Any) -> PromptClassification:
    return PromptClassification(
        model=model, task=task, data=str(data), **{"shots": 4, "max_length": 48, **options}
    )


def test_the_loss_is_that_of_the_words_at_the_mask(bert: PretrainedModel, tmp_path: Path) -> None:
    """Against one prompt at a time, filled in by hand."""
    task = make(bert, write_rte(tmp_path))
    model, tokenizer = task.build_model(0).eval(), task._tokenizer
    train, rows = task.splits(0).train, task.parts["train"]
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no")]
    expected = []
    with torch.no_grad():
        for (a, b), label in zip(rows.texts, rows.labels, strict=True):
            prompt = tokenizer(f"{a}? [MASK], {b}", return_tensors="pt")
            place = int((prompt["input_ids"][0] == tokenizer.mask_token_id).nonzero())
            logits = model(**prompt).logits[0, place, words]
            expected.append(-float(logits.log_softmax(-1)[int(label)]))
        batch = task.collate([train[i] for i in range(len(train))])
        loss, logits = task.outputs(model, batch)
    assert logits.shape == (8, 2)
    assert float(loss) == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_few_shots(bert: PretrainedModel, tmp_path: Path) -> None:
    data = write_rte(tmp_path)
    parts = make(bert, data, shots=5, test_examples=10).parts
    for name in ("train", "validation"):
        assert Counter(parts[name].labels) == {0: 5, 1: 5}
    assert Counter(parts["test"].labels) == {0: 5, 1: 5}
    assert not set(parts["train"].texts) & set(parts["validation"].texts)
    assert make(bert, data, shots=5).parts["train"] == parts["train"]
    assert make(bert, data, shots=5, split_seed=1).parts["train"] != parts["train"]
    assert len(make(bert, data, test_examples=1000).parts["test"]) == 24  # all, where there are fewer


def test_a_class_short_of_shots_gives_what_it_has_to_train_first() -> None:
    """Against MeZO's generator, written out: shuffled lines, class by class, [:k] and [k:2k]."""
    labels = [0] * 3 + [1] * 10 + [2] * 6
    order = np.random.default_rng(derive_seed(7, "shots")).permutation(len(labels))
    lines = {name: [i for i in order if labels[i] == number] for number, name in enumerate("abc")}
    drawn = few_shots.draw(labels, "abc", 4, 7)
    assert drawn["train"] == sorted(i for own in lines.values() for i in own[:4])
    assert drawn["validation"] == sorted(i for own in lines.values() for i in own[4:8])
    assert not set(drawn["train"]) & set(drawn["validation"])
    parts = {part: [labels[i] for i in indices] for part, indices in drawn.items()}
    short = few_shots.short(parts, "abc", {"train": 4, "validation": 4})
    assert short == {"train": {"a": 3}, "validation": {"a": 0, "c": 2}}
    assert few_shots.draw(labels, "abc", 4, 7) == drawn != few_shots.draw(labels, "abc", 4, 8)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 0, 2], "data: class 'b' has no example to train on"),
        ([0, 1, 2, 2], "shots: 2 examples of each class leave none for validation (the largest class has 2)"),
    ],
)
def test_what_cannot_be_drawn(labels: list[int], said: str) -> None:
    assert said in refused(lambda: few_shots.draw(labels, "abc", 2, 0))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "short", "sizes"),
    [
        (
            "trec",
            {"train": {"ABBR": 86}, "validation": {"ABBR": 0, "LOC": 323, "NUM": 384}},
            {"train": 86 + 5 * 512, "validation": 3 * 512 + 323 + 384, "test": 500},
        ),
        ("sst5", {"train": {}, "validation": {}}, {"train": 5 * 512, "validation": 5 * 512, "test": 1000}),
    ],
)
def test_the_papers_shots_on_real_trec_and_sst5(task: Any, short: Any, sizes: dict[str, int]) -> None:
    model = PretrainedModel(name_or_path=str(minilm()))

    def drawn(seed: int) -> PromptClassification:
        return make(model, real(task), task, shots=512, test_examples=1000, max_length=128, split_seed=seed)

    found = drawn(0)
    assert found.shortages() == short
    described = found.describe()  # every label word is one token, and every prompt is made
    assert described["fewer_than_shots"] == short
    assert described["examples"] == sizes
    # both files hold some questions twice: a row is in one split, its text may be in two
    pairs = {name: Counter(zip(rows.texts, rows.labels, strict=True)) for name, rows in found.parts.items()}
    there = Counter(zip(found._read()["train"].texts, found._read()["train"].labels, strict=True))
    assert not pairs["train"] + pairs["validation"] - there
    assert drawn(0).parts["train"].digest == found.parts["train"].digest != drawn(1).parts["train"].digest


@pytest.mark.data
@pytest.mark.parametrize(("task", "test"), [("sst2", 872), ("rte", 277)])
def test_the_papers_shots_on_real_files(bert: PretrainedModel, task: str, test: int) -> None:
    found = make(bert, real("glue"), task, shots=512, max_length=128)
    assert {name: len(rows) for name, rows in found.parts.items()} == {
        "train": 1024,
        "validation": 1024,
        "test": test,
    }
    words = ("terrible", "great") if task == "sst2" else ("yes", "no")
    assert found.word_ids == [found._tokenizer.convert_tokens_to_ids(word) for word in words]


def test_long_texts_are_cut_and_the_mask_stays(bert: PretrainedModel, tmp_path: Path) -> None:
    labels = ("entailment", "not_entailment")
    rows = [[i, "abc " * 30 + str(i), "short" if i % 3 else "d" * 60, labels[i % 2]] for i in range(24)]
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", [["index", "sentence1", "sentence2", "label"], *rows])
    task = make(bert, tmp_path)
    assert task.describe()["truncated"] == {"train": 8, "validation": 8, "test": 24}
    test = task.splits(0).test
    for i in range(24):
        tokens = test[i]["input_ids"]
        assert len(tokens) == 48
        assert tokens[test[i]["mask_positions"]] == task._tokenizer.mask_token_id
        text = task._tokenizer.decode(tokens)
        assert ("short" in text.replace(" ", "")) is bool(i % 3)  # the longer text is cut first


# -- layouts ----------------------------------------------------------------------------------------------


def test_snli_leaves_out_what_annotators_did_not_agree_on(tmp_path: Path) -> None:
    labels = ["entailment", "-", "contradiction", "neutral"]
    lines = [{"gold_label": x, "sentence1": f"a{i}", "sentence2": "b"} for i, x in enumerate(labels)]
    for split in ("train", "test"):
        (tmp_path / f"snli_1.0_{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = prompt_data.read("snli", str(tmp_path), None)["test"]
    assert rows.labels == (0, 2, 1)
    assert rows.incomplete == 1
    assert rows.texts[1] == ("a2", "b")


def test_sst5_and_trec(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text('4,"good, ""really"" good"\n0,bad\n')
    assert prompt_data.read("sst5", str(tmp_path), None)["train"].texts == (
        ('good, "really" good',),
        ("bad",),
    )
    for name in ("train_5500.label", "TREC_10.label"):
        (tmp_path / name).write_bytes("NUM:date When was Cort\xe9s born ?\nHUM:ind Who ?\n".encode("latin-1"))
    rows = prompt_data.read("trec", str(tmp_path), None)["test"]
    assert rows.texts == (("When was Cortés born ?",), ("Who ?",))
    assert [prompt_data.DATA["trec"].labels[int(i)] for i in rows.labels] == ["NUM", "HUM"]


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, configuration: Any, revision: Any, split: str) -> datasets.Dataset:
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"premise": ["a", "x"], "hypothesis": ["b", "y"], "label": [2, -1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert prompt_data.read("snli", None, "r1")["test"].labels == (2,)
    assert prompt_data.read("mnli", None, "r1")["train"].texts == (("a", "b"),)
    assert asked[1:3] == [("stanfordnlp/snli", None, "test"), ("nyu-mll/glue", "mnli", "train")]
    assert asked[3] == ("nyu-mll/glue", "mnli", "validation_matched")


# -- bad input --------------------------------------------------------------------------------------------


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"template": "{a}, {b}"}, "template: '{a}, {b}': {mask} must stand in it once, not 0 times"),
        ({"template": "{mask} {a} {b} {mask}"}, "{mask} must stand in it once, not 2 times"),
        ({"template": "{a} {mask}"}, "{b} must stand in it once, not 0 times"),
        ({"template": "{a} {b} {mask} {c}"}, "unknown field {c}; fields: {a}, {b}, {mask}"),
        ({"template": "{a} {b} {mask"}, "template: '{a} {b} {mask'"),
        ({"label_words": ["yes"]}, "label_words: 1 words for 2 classes (entailment, not_entailment)"),
        (
            {"label_words": ["yes", "perhaps"]},
            "label_words: 'perhaps' is not one token of this model, but p ##e",
        ),
        ({"label_words": ["yes", "Yes"]}, "label_words: 'Yes' is the same token as another class's word"),
        (
            {"shots": 30},
            "shots: 30 examples of each class leave none for validation (the largest class has 30)",
        ),
        ({"max_length": 500}, "max_length: 500 is more than the model's 128"),
        ({"max_length": 8, "template": "{a} abcdefgh {mask} {b}"}, "8 tokens leave no room for a text"),
        ({"test_examples": 1}, "test_examples: 1 of 24 examples cannot be divided by class"),
    ],
)
def test_bad_options(bert: PretrainedModel, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    data = write_rte(tmp_path)
    assert said in refused(lambda: make(bert, data, **options).fingerprint())


def test_texts_with_a_mask_of_their_own(bert: PretrainedModel, tmp_path: Path) -> None:
    data = write_rte(tmp_path)
    path = data / "RTE" / "dev.tsv"
    path.write_text(path.read_text().replace("dev 3\t", "dev [MASK]\t"))
    assert "test, example 4: its text holds [MASK] itself" in refused(make(bert, data).fingerprint)


@pytest.mark.parametrize(
    ("task", "file", "content", "said"),
    [
        ("trec", "TREC_10.label", "WHY:x Why ?", "TREC_10.label, line 1: unknown label 'WHY'; known: ABBR"),
        ("trec", "TREC_10.label", "NUM:x", "TREC_10.label, line 1: a text is empty"),
        ("sst5", "test.csv", "1,a,b", "test.csv, line 1: 3 fields; expected label,sentence"),
        ("snli", "snli_1.0_test.jsonl", '{"gold_label": "neutral"}', "line 1: no field 'sentence1'"),
        ("snli", "snli_1.0_test.jsonl", "{", "line 1: not JSON"),
        ("snli", "snli_1.0_test.jsonl", "", "snli_1.0_test.jsonl: no rows"),
    ],
)
def test_bad_files(
    bert: PretrainedModel, tmp_path: Path, task: str, file: str, content: str, said: str
) -> None:
    good = {"trec": "NUM:x 1 ?\n", "sst5": "1,a\n"}
    neutral = json.dumps({"gold_label": "neutral", "sentence1": "a", "sentence2": "b"})
    (tmp_path / prompt_data.FILES[task]["train"]).write_text(good.get(task, neutral))
    (tmp_path / file).write_text(content)
    assert said in refused(make(bert, tmp_path, task).fingerprint)


def test_what_is_not_there(bert: PretrainedModel, tmp_path: Path) -> None:
    assert "data: no such folder" in refused(make(bert, tmp_path / "nowhere").fingerprint)
    assert "data: no such file" in refused(make(bert, tmp_path, "trec").fingerprint)
    task = PromptClassification(model=bert, task="snli", max_length=48)
    assert "data: stanfordnlp/snli: neither a local folder nor to be had" in refused(task.fingerprint)


def test_a_model_without_mask(tmp_path: Path) -> None:
    model = PretrainedModel(name_or_path=str(gpt2_folder(tmp_path / "gpt2")))
    assert "has no mask token" in refused(make(model, write_rte(tmp_path / "data")).fingerprint)


# -- as in MeZO's code ------------------------------------------------------------------------------------


def test_mezos_joins(bert: PretrainedModel, tmp_path: Path) -> None:
    """The premise without its stop, the hypothesis in lower case; a text alone stays as it is."""
    rows = [[i, "It rains.", "It Rains Now", "entailment" if i % 2 else "not_entailment"] for i in range(16)]
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", [["index", "sentence1", "sentence2", "label"], *rows])
    task = make(bert, tmp_path, join="mezo")
    example = task.splits(0).train[0]
    expected = task._tokenizer(f"It rains? {task._tokenizer.mask_token}, it Rains Now")["input_ids"]
    assert example["input_ids"] == expected
    assert task._joined(["Good."]) == ["Good."]
    assert task._joined(["", ""]) == ["", ""]
    plain = make(bert, tmp_path).splits(0).train[0]  # not from the other's tokens, which are kept
    assert plain["input_ids"] != expected


def test_the_runs_seed_draws_the_examples(bert: PretrainedModel, tmp_path: Path) -> None:
    task = make(bert, write_rte(tmp_path), draw="run_seed")
    texts = {
        seed: [[tuple(e["input_ids"]) for e in part] for part in (found.train, found.validation, found.test)]
        for seed, found in ((seed, task.splits(seed)) for seed in (0, 1))
    }
    assert texts[0][2] == texts[1][2]
    for part in (0, 1):
        assert texts[0][part] != texts[1][part]
    for train, validation, _ in texts.values():
        assert not {*train} & {*validation}
    again = task.splits(1)
    assert [tuple(e["input_ids"]) for e in again.train] == texts[1][0]
    fixed = make(bert, task.data, split_seed=1)  # the draw of a seed is that of the same split_seed
    assert [tuple(e["input_ids"]) for e in fixed.splits(5).train] == texts[1][0]
    assert task.fingerprint() == make(bert, task.data, draw="run_seed").fingerprint()


def test_options_that_came_later_leave_runs_as_they_were(bert: PretrainedModel) -> None:
    from flatbench import tasks

    model = tasks.REGISTRY.options("prompt_classification")
    written = model(model=bert, task="rte").model_dump(mode="json")
    assert not {"join", "draw"} & {*written}
