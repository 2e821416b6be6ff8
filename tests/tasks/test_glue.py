"""GLUE: real files, metrics against their definitions, splits and batches."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.text import glue_data
from flatbench.tasks.text.glue import Glue
from flatbench.training.trainer import fixed_batches
from tests.tasks.glue_cases import make, write_stsb
from tests.tasks.task_cases import bert_folder, minilm, real, write_rte, write_tsv

CPU = torch.device("cpu")

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
@pytest.mark.slow
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
    assert task.metrics(logits, labels)["matthews"] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_and_accuracy_are_their_definitions(encoder: PretrainedModel, tmp_path: Path, name: str) -> None:
    logits, labels = guesses(0)
    tp, fp, fn, tn = table(logits, labels)
    task = make(encoder, tmp_path, name)
    assert task.metric == "accuracy"
    assert task.metrics(logits, labels) == pytest.approx(
        {"f1": 2 * tp / (2 * tp + fp + fn), "accuracy": (tp + tn) / 200}, rel=1e-10
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
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


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
