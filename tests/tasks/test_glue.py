"""GLUE: real files, metrics against their definitions, splits, and every layout."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from task_cases import bert_folder, minilm, real, write_rte, write_tsv

from flatbench import runner, store
from flatbench.errors import InputError
from flatbench.plan import Plan
from flatbench.study import Study
from flatbench.tasks import glue_data
from flatbench.tasks.glue import Glue
from flatbench.tasks.pretrained import PretrainedModel
from flatbench.training import fixed_batches

CPU = torch.device("cpu")
PAIR = ["sentence1", "sentence2"]

# task -> rows of train and dev, and rows of each class in both, as the data's SOURCE files state
REAL = {
    "cola": (8551, 1043, [2528, 6023], [322, 721]),
    "sst2": (67349, 872, [29780, 37569], [428, 444]),
    "mrpc": (3668, 408, [1194, 2474], [129, 279]),
    "rte": (2490, 277, [1249, 1241], [146, 131]),
    "stsb": (5749, 1500, None, None),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(bert_folder(tmp_path_factory.mktemp("encoder") / "bert")))


def make(encoder: PretrainedModel, data: Path, task: Any = "rte", **options: Any) -> Glue:
    return Glue(model=encoder, data=str(data), task=task, **{"max_length": 32, **options})


def collated(task: Glue, part: Any, indices: list[int]) -> dict[str, torch.Tensor]:
    return task.collate([part[i] for i in indices])


# -- real files -------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("task", REAL)
def test_real_files_parse_whole(task: str) -> None:
    train, dev, *classes = REAL[task]
    found = glue_data.read(task, str(real("glue")), None)
    assert [len(found["train"]), len(found["test"])] == [train, dev]
    for rows, expected in zip((found["train"], found["test"]), classes, strict=True):
        assert rows.incomplete == 0
        assert len(rows.texts) == len(rows)
        if expected:
            assert [rows.labels.count(i) for i in range(2)] == expected
        else:
            assert min(rows.labels) == 0
            assert max(rows.labels) == 5


@pytest.mark.data
def test_quirks_of_the_real_files() -> None:
    folder = str(real("glue"))
    mrpc = glue_data.read("mrpc", folder, None)["test"]
    assert mrpc.texts[0][0].startswith("He said the foodservice pie business doesn 't fit")
    assert mrpc.texts[0][1].startswith('" The foodservice pie business')  # a quote without a partner
    assert mrpc.labels[0] == 1
    cola = glue_data.read("cola", folder, None)["test"]
    assert cola.texts[0] == ("The sailors rode the breeze clear of the rocks.",)
    assert cola.texts[-1] == ("John talked to Bill about himself.",)  # the file ends without a newline
    stsb = glue_data.read("stsb", folder, None)["train"]
    assert stsb.texts[0] == ("A plane is taking off.", "An air plane is taking off.")
    assert stsb.labels[:3] == (5.0, 3.8, 3.8)


@pytest.mark.data
def test_a_folder_of_one_task_is_as_good_as_the_whole() -> None:
    folder = real("glue")
    assert glue_data.read("rte", str(folder / "RTE"), None) == glue_data.read("rte", str(folder), None)


@pytest.mark.data
def test_real_encoder_on_real_files() -> None:
    task = make(
        PretrainedModel(name_or_path=str(minilm())),
        real("glue"),
        max_length=64,
        train_examples=100,
        validation_examples=60,
    )
    assert task.modules_to_save == ("classifier",)
    assert task.target_modules == ("query", "value")
    described = task.describe()
    assert described["examples"] == {"train": 100, "validation": 60, "test": 277}
    assert 0 < described["truncated"]["train"] < 100
    model = task.build_model(0)
    found = task.evaluate(model, fixed_batches(task, task.splits(0).validation, 30, CPU))
    assert found["loss"] == pytest.approx(math.log(2), abs=0.1)  # a new head knows nothing


# -- metrics ----------------------------------------------------------------------------------------------


def guesses(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(200, 2)`` that are right more often than not, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(200, generator=generator) < 0.3).long()
    logits = torch.randn(200, 2, generator=generator)
    logits[torch.arange(200), labels] += 0.7
    return logits, labels


def table(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives."""
    pairs = Counter(zip(logits.argmax(-1).tolist(), labels.tolist(), strict=True))
    return pairs[1, 1], pairs[1, 0], pairs[0, 1], pairs[0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_matthews_is_its_definition(encoder: PretrainedModel, tmp_path: Path, seed: int) -> None:
    logits, labels = guesses(seed)
    tp, fp, fn, tn = table(logits, labels)
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    task = make(encoder, tmp_path, "cola")
    assert task.metric == "matthews"
    assert task.metrics(logits, labels)["matthews"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_and_accuracy_are_their_definitions(encoder: PretrainedModel, tmp_path: Path, name: str) -> None:
    logits, labels = guesses(0)
    tp, fp, fn, tn = table(logits, labels)
    task = make(encoder, tmp_path, name)
    assert task.metric == "accuracy"
    assert task.metrics(logits, labels) == pytest.approx(
        {"f1": 2 * tp / (2 * tp + fp + fn), "accuracy": (tp + tn) / 200}, rel=1e-12
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    left, right = left - left.mean(), right - right.mean()
    return float((left * right).sum() / np.sqrt((left**2).sum() * (right**2).sum()))


def test_correlations_are_their_definitions(encoder: PretrainedModel, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 26, (300,), generator=generator) / 5  # many ties
    logits = (labels + torch.randn(300, generator=generator)).round(decimals=1).unsqueeze(-1)
    task = make(encoder, tmp_path, "stsb")
    assert task.metric == "pearson"
    scores, truth = logits.squeeze(-1).double().numpy(), labels.numpy().astype(float)
    expected = {
        "pearson": correlation(scores, truth),
        "spearman": correlation(ranks(scores), ranks(truth)),
    }
    assert task.metrics(logits, labels) == pytest.approx(expected, rel=1e-6)


def test_constant_predictions(encoder: PretrainedModel, tmp_path: Path) -> None:
    """A correlation with them is undefined; Matthews is 0 by convention."""
    found = make(encoder, tmp_path, "stsb").metrics(torch.ones(5, 1), torch.arange(5.0))
    assert math.isnan(found["pearson"])
    assert math.isnan(found["spearman"])
    constant = torch.tensor([[1.0, 0.0]] * 4)
    assert make(encoder, tmp_path, "cola").metrics(constant, torch.tensor([0, 1, 0, 1]))["matthews"] == 0
    assert make(encoder, tmp_path, "mrpc").metrics(constant, torch.tensor([1, 1, 0, 1]))["f1"] == 0


def test_accuracy_of_three_classes(encoder: PretrainedModel, tmp_path: Path) -> None:
    logits = torch.eye(3)
    assert make(encoder, tmp_path, "mnli").metrics(logits, torch.tensor([0, 1, 0])) == {
        "accuracy": pytest.approx(2 / 3)
    }


# -- splits -----------------------------------------------------------------------------------------------


def test_sizes_shares_and_seeds(encoder: PretrainedModel, tmp_path: Path) -> None:
    data = write_rte(tmp_path, train=100, dev=40)
    task = make(encoder, data, train_examples=40, validation_examples=20, test_examples=30)
    parts = task.parts
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 40, "validation": 20, "test": 30}
    for rows in parts.values():
        assert rows.labels.count(0) == rows.labels.count(1)
    texts = [text for rows in parts.values() for text in rows.texts]
    assert len(set(texts)) == len(texts)
    same = make(encoder, data, train_examples=40, validation_examples=20, test_examples=30)
    assert same.parts == parts
    other = make(encoder, data, train_examples=40, validation_examples=20, split_seed=1).parts
    assert other["validation"] != parts["validation"]


def test_validation_does_not_depend_on_the_size_of_train(encoder: PretrainedModel, tmp_path: Path) -> None:
    data = write_rte(tmp_path)
    few = make(encoder, data, train_examples=10, validation_examples=20).parts
    all_left = make(encoder, data, validation_examples=20).parts
    assert few["validation"] == all_left["validation"]
    assert len(all_left["train"]) == 40
    assert set(few["train"].texts) < set(all_left["train"].texts)


def test_default_sizes(encoder: PretrainedModel, tmp_path: Path) -> None:
    parts = make(encoder, write_rte(tmp_path, train=100)).parts
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 90, "validation": 10, "test": 24}


@pytest.mark.data
def test_scores_are_stratified_too(encoder: PretrainedModel) -> None:
    parts = make(encoder, real("glue"), "stsb", validation_examples=500).parts
    for score in range(6):
        shares = [
            sum(round(label) == score for label in parts[name].labels) / len(parts[name])
            for name in ("train", "validation")
        ]
        assert shares[0] == pytest.approx(shares[1], abs=0.003)


def test_label_noise(encoder: PretrainedModel, tmp_path: Path) -> None:
    data = write_rte(tmp_path)
    clean = make(encoder, data, validation_examples=20).splits(0)
    noisy = make(encoder, data, validation_examples=20, label_noise=0.25)
    assert int((noisy.splits(0).train.labels != clean.train.labels).sum()) == 10
    assert torch.equal(noisy.splits(0).validation.labels, clean.validation.labels)
    assert torch.equal(noisy.splits(0).test.labels, clean.test.labels)
    assert not torch.equal(noisy.splits(0).train.labels, noisy.splits(1).train.labels)
    assert torch.equal(noisy.splits(1).train.labels, noisy.splits(1).train.labels)


def test_no_label_noise_on_scores(encoder: PretrainedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label_noise"):
        make(encoder, tmp_path, "stsb", label_noise=0.1)


# -- batches and loss -------------------------------------------------------------------------------------


def test_padding_does_not_matter(encoder: PretrainedModel, tmp_path: Path) -> None:
    task = make(encoder, write_rte(tmp_path), validation_examples=20)
    train = task.splits(0).train
    model = task.build_model(0).double().eval()
    order = sorted(range(len(train)), key=lambda i: len(train[i]["input_ids"]))
    short, long = order[0], order[-1]
    alone, both = collated(task, train, [short]), collated(task, train, [short, long])
    assert both["input_ids"].shape[1] > alone["input_ids"].shape[1]
    assert alone["attention_mask"].all()
    with torch.no_grad():
        left = model(**alone).logits[0]
        right = model(**both).logits[0]
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)


def test_truncation_is_counted(encoder: PretrainedModel, tmp_path: Path) -> None:
    rows = [["a", "b"]] * 20 + [["a" * 40, "b c"]] * 8
    lines = [[i, *row, "entailment" if i % 2 else "not_entailment"] for i, row in enumerate(rows)]
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", [["index", "sentence1", "sentence2", "label"], *lines])
    task = make(encoder, tmp_path, max_length=24, validation_examples=4)
    described = task.describe()
    assert described["truncated"]["train"] + described["truncated"]["validation"] == 8
    assert described["truncated"]["test"] == 8
    test = task.splits(0).test
    assert max(len(test[i]["input_ids"]) for i in range(len(test))) == 24
    assert make(encoder, tmp_path, max_length=64, validation_examples=4).describe()["truncated"]["test"] == 0


def write_stsb(folder: Path) -> Path:
    header = ["index", "genre", "filename", "year", "old_index", "source1", "source2", *PAIR, "score"]
    rows = [
        [i, "main", "f", "2012", i, "none", "none", f"one {i}", f"two {i * i}", f"{(i % 11) / 2:.3f}"]
        for i in range(44)
    ]
    for name in ("train", "dev"):
        write_tsv(folder / "STS-B" / f"{name}.tsv", [header, *rows])
    return folder


def test_scores_are_a_regression(encoder: PretrainedModel, tmp_path: Path) -> None:
    task = make(encoder, write_stsb(tmp_path), "stsb", validation_examples=11)
    model = task.build_model(0).double().eval()
    batch = collated(task, task.splits(0).train, list(range(6)))
    assert batch["labels"].dtype == torch.float32
    with torch.no_grad():
        output = model(**{**batch, "labels": batch["labels"].double()})
    assert output.logits.shape == (6, 1)
    expected = ((output.logits.squeeze(-1) - batch["labels"].double()) ** 2).mean()
    torch.testing.assert_close(output.loss, expected)
    found = task.evaluate(task.build_model(0), fixed_batches(task, task.splits(0).test, 1, CPU))
    assert set(found) == {"loss", "pearson", "spearman"}


# -- layouts ----------------------------------------------------------------------------------------------


def mnli_rows(count: int, consensus: int) -> list[list[str]]:
    header = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
    header += "sentence2_parse sentence1 sentence2 " + " ".join(f"label{i + 1}" for i in range(consensus))
    labels = ("entailment", "neutral", "contradiction")
    rows = [[*header.split(), "gold_label"]]
    for i in range(count):
        votes = [labels[(i + 1) % 3]] * consensus
        rows.append(
            [str(i), "p", "q", "fiction", *["(x)"] * 4, f"premise {i}", "claim", *votes, labels[i % 3]]
        )
    return rows


def write_layout(task: str, folder: Path) -> list[tuple[tuple[str, ...], int]]:
    """Files of 20 rows in the layout of ``task``; what should be read from each row."""
    pair = [(f'first {i} "', f"second {i}") for i in range(20)]
    if task == "qqp":
        rows = [[i, i, i, *texts, i % 2] for i, texts in enumerate(pair)]
        content: list[list[object]] = [
            ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
            *rows[:5],
            [99, 1, 2, "cut short"],
            [98, 1, 2, "the other is empty", "", 0],
            *rows[5:],
        ]
    elif task == "qnli":
        labels = ("entailment", "not_entailment")
        content = [["index", "question", "sentence", "label"]]
        content += [[i, *texts, labels[i % 2]] for i, texts in enumerate(pair)]
    elif task == "wnli":
        content = [["index", "sentence1", "sentence2", "label"]]
        content += [[i, *texts, i % 2] for i, texts in enumerate(pair)]
    else:
        content = [["sentence", "label"], *([texts[0], i % 2] for i, texts in enumerate(pair))]
    name = glue_data.LAYOUTS[task].folder
    for file in ("train", "dev"):
        write_tsv(folder / name / f"{file}.tsv", content)
    return [(texts[:1] if task == "sst2" else texts, i % 2) for i, texts in enumerate(pair)]


@pytest.mark.parametrize("task", ["qqp", "qnli", "wnli", "sst2"])
def test_layouts(tmp_path: Path, task: str) -> None:
    expected = write_layout(task, tmp_path)
    for rows in glue_data.read(task, str(tmp_path), None).values():
        assert list(zip(rows.texts, rows.labels, strict=True)) == expected
        assert rows.incomplete == (2 if task == "qqp" else 0)


def test_rows_left_out_are_recorded(encoder: PretrainedModel, tmp_path: Path) -> None:
    write_layout("qqp", tmp_path)
    assert make(encoder, tmp_path, "qqp", validation_examples=4).describe()["incomplete_rows"] == 4


def write_mnli(folder: Path) -> Path:
    write_tsv(folder / "MNLI" / "train.tsv", mnli_rows(60, 1))
    write_tsv(folder / "MNLI" / "dev_matched.tsv", mnli_rows(15, 5))
    write_tsv(folder / "MNLI" / "dev_mismatched.tsv", mnli_rows(18, 5))
    return folder


def test_mnli_has_two_test_sets(encoder: PretrainedModel, tmp_path: Path) -> None:
    task = make(encoder, write_mnli(tmp_path), "mnli", validation_examples=15)
    splits = task.splits(0)
    assert [len(splits.test), len(splits.more_tests["test_mismatched"])] == [15, 18]
    assert task.parts["test"].labels[:4] == (0, 1, 2, 0)  # gold_label, not label1
    assert task.parts["test"].texts[0] == ("premise 0", "claim")
    assert task.build_model(0).config.num_labels == 3


def study(encoder: PretrainedModel, data: Path, **changes: Any) -> Study:
    content = {
        "name": "tiny",
        "task": {"name": "glue", "task": "mnli", "data": str(data), "validation_examples": 15},
        "model": {"name_or_path": encoder.name_or_path},
        "methods": ["lora"],
        "train": {"epochs": 1, "threads": 1},
        "seeds": [0],
    }
    return Study({**content, **changes}, "tiny.yaml")


def test_a_final_run_evaluates_both_and_records_the_data(encoder: PretrainedModel, tmp_path: Path) -> None:
    folder = store.StudyFolder(tmp_path / "results", "tiny")
    [run] = Plan(study(encoder, write_mnli(tmp_path / "data")), folder).final([])
    directory = folder.run(run.id)
    directory.prepare(run.spec())
    assert runner.finish(directory.path) == "done"
    result = directory.result()
    assert result is not None
    assert set(result["metrics"]) == {"train", "validation", "test", "test_mismatched"}
    assert 0 <= result["metrics"]["test_mismatched"]["accuracy"] <= 1
    assert result["data"]["examples"]["test_mismatched"] == 18
    assert result["data"]["truncated"]["train"] == 0


def test_byte_order_mark_carriage_returns_and_odd_characters(tmp_path: Path) -> None:
    text = "\ufeffindex\tsentence1\tsentence2\tlabel\r\n0\ta\u2028b\x85c \"\td\t1\r\n1\t'e\tf\t0"
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_bytes(text.encode())
    rows = glue_data.read("wnli", str(tmp_path), None)["train"]
    assert rows.texts == (('a\u2028b\x85c "', "d"), ("'e", "f"))
    assert rows.labels == (1, 0)


# -- the hub ----------------------------------------------------------------------------------------------


def test_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, task: str, revision: str | None, split: str) -> datasets.Dataset:
        asked.append((name, task, revision, split))
        return datasets.Dataset.from_dict(
            {"premise": ["a", split], "hypothesis": ["b", "c"], "label": [2, 0], "idx": [0, 1]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = glue_data.read("mnli", "some/glue", "v1")
    assert asked == [
        ("some/glue", "mnli", "v1", split)
        for split in ("train", "validation_matched", "validation_mismatched")
    ]
    assert found["train"].texts == (("a", "b"), ("train", "c"))
    assert found["test"].texts[1] == ("validation_matched", "c")
    assert found["test_mismatched"].labels == (2, 0)


def test_hidden_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"sentence": ["a"], "label": [-1]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"other/glue \(cola, train\), row 0: label -1"):
        glue_data.read("cola", "other/glue", None)


def test_offline(encoder: PretrainedModel) -> None:
    with pytest.raises(InputError, match=r"data: nyu-mll/glue: neither a local folder nor .* from the hub"):
        Glue(model=encoder, task="rte").fingerprint()


# -- bad input --------------------------------------------------------------------------------------------

HEADER = ["index", *PAIR, "label"]
GOOD = [[i, f"text {i}", "other", ("entailment", "not_entailment")[i % 2]] for i in range(40)]


def refused(encoder: PretrainedModel, data: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        make(encoder, data, **{"validation_examples": 10, **options}).fingerprint()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folder_and_file(encoder: PretrainedModel, tmp_path: Path) -> None:
    assert "no such folder" in refused(encoder, tmp_path / "nowhere")
    write_tsv(tmp_path / "train.tsv", [HEADER, *GOOD])
    message = refused(encoder, tmp_path)
    assert "no such file" in message
    assert "dev.tsv" in message


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([["index", "sentence1", "label"]], "train.tsv: no column 'sentence2'; its header has index, sent"),
        ([HEADER], "train.tsv: no rows"),
        ([], "train.tsv: no column 'sentence1'"),
        ([HEADER, *GOOD, [40, "a", "b"]], "train.tsv, line 42: 3 fields, so column 'label' is missing"),
        (
            [HEADER, *GOOD[:2], [40, "a", "b", "maybe"]],
            "line 4, column 'label': unknown label 'maybe'; known",
        ),
        ([HEADER, *GOOD[:1], [40, " ", "b", "entailment"]], "train.tsv, line 3: column 'sentence1' is empty"),
    ],
)
def test_bad_files(encoder: PretrainedModel, tmp_path: Path, rows: Any, said: str) -> None:
    write_tsv(tmp_path / "train.tsv", rows)
    write_tsv(tmp_path / "dev.tsv", [HEADER, *GOOD])
    assert said in refused(encoder, tmp_path)


def test_no_text_at_all(encoder: PretrainedModel, tmp_path: Path) -> None:
    write_tsv(tmp_path / "dev.tsv", [HEADER, *GOOD])
    (tmp_path / "train.tsv").write_bytes(b"index\tsentence1\tsentence2\tlabel\n0\t\xff\xfe\tb\tentailment\n")
    assert "train.tsv: not readable as UTF-8 text" in refused(encoder, tmp_path)


@pytest.mark.parametrize("score", ["5.5", "high", "nan", "-1"])
def test_bad_scores(encoder: PretrainedModel, tmp_path: Path, score: str) -> None:
    folder = write_stsb(tmp_path) / "STS-B"
    with (folder / "dev.tsv").open("a") as file:
        file.write("\t".join(["50", *["x"] * 8, score]))
    message = refused(encoder, folder, task="stsb")
    assert f"dev.tsv, line 46, column 'score': '{score}' is no score from 0 to 5" in message


def test_cola_columns_are_named_by_number(encoder: PretrainedModel, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", [["a", 1, "", "text"], ["a", 2, "*", "text"]])
    assert "line 2, column 2: unknown label '2'" in refused(encoder, tmp_path, task="cola")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"validation_examples": 100}, "validation_examples: 100 asked for, but only 40"),
        ({"train_examples": 31}, "train_examples: 31 asked for, but only 30"),
        ({"test_examples": 41}, "test_examples: 41 asked for, but only 40"),
        ({"train_examples": 1}, "train_examples: 1 of 30 examples cannot be divided by class"),
        ({"validation_examples": 40}, "train_examples: nothing is left"),
        ({"max_length": 1000}, "max_length: 1000 is more than the model's 128 positions"),
    ],
)
def test_sizes_that_cannot_be(encoder: PretrainedModel, tmp_path: Path, options: Any, said: str) -> None:
    for name in ("train", "dev"):
        write_tsv(tmp_path / f"{name}.tsv", [HEADER, *GOOD])
    assert said in refused(encoder, tmp_path, **options)


# -- identity ---------------------------------------------------------------------------------------------


def test_fingerprint_follows_rows_splits_weights_and_tokenizer(tmp_path: Path) -> None:
    data, folder = write_rte(tmp_path / "data"), bert_folder(tmp_path / "bert")
    model = PretrainedModel(name_or_path=str(folder))

    def now(**options: Any) -> str:
        return make(model, data, validation_examples=20, **options).fingerprint()

    seen = [now()]
    (folder / "README.md").write_text("words that load nothing")
    (data / "RTE" / "train.tsv").touch()
    assert now() == seen[0]
    seen.append(now(split_seed=1))
    seen.append(now(train_examples=20))
    path = data / "RTE" / "train.tsv"
    path.write_text(path.read_text() + "99\tone more\trow\tentailment\n")
    seen.append(now())
    bert_folder(folder, hidden_size=20)
    seen.append(now())
    vocabulary = (folder / "tokenizer.json").read_text().replace("##a", "##A")
    (folder / "tokenizer.json").write_text(vocabulary)
    seen.append(now())
    assert len(set(seen)) == len(seen)
