"""A user's own files as a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from flatbench import store
from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.runs.finish import finish
from flatbench.study import load
from flatbench.study.plan import Plan
from flatbench.tasks.text.text_classification import TextClassification
from tests.tasks.task_cases import bert_folder, write_reviews


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(bert_folder(tmp_path_factory.mktemp("encoder") / "bert")))


def make(encoder: PretrainedModel, train: Path, **options: Any) -> TextClassification:
    return TextClassification(model=encoder, train=str(train), **{"max_length": 32, **options})


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "csv.gz"])
def test_formats_say_the_same(encoder: PretrainedModel, tmp_path: Path, ending: str) -> None:
    parts = make(encoder, write_reviews(tmp_path / f"reviews.{ending}")).parts
    expected = make(encoder, write_reviews(tmp_path / "plain.csv")).parts
    assert parts == expected
    assert {name: len(rows) for name, rows in parts.items()} == {"train": 42, "validation": 6, "test": 12}


def test_quotes_commas_and_words_that_pandas_takes_for_missing(
    encoder: PretrainedModel, tmp_path: Path
) -> None:
    rows = [{"text": 'a, "b" NA', "label": "NA"}, {"text": "null", "label": "None"}] * 20
    pd.DataFrame(rows).to_csv(tmp_path / "own.csv", index=False)
    task = make(encoder, tmp_path / "own.csv")
    assert task.labels == ("NA", "None")
    assert set(task.parts["train"].texts) == {('a, "b" NA',), ("null",)}


def test_numbers_are_classes_too(encoder: PretrainedModel, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"a": f"x{i}", "b": "y", "stars": i % 3}) + "\n" for i in range(60))
    )
    task = make(encoder, tmp_path / "own.jsonl", text_columns=["a", "b"], label_column="stars")
    assert task.labels == ("0", "1", "2")
    assert task.build_model(0).config.num_labels == 3
    assert all(len(pair) == 2 for pair in task.parts["train"].texts)


def test_files_of_their_own(encoder: PretrainedModel, tmp_path: Path) -> None:
    files = {name: write_reviews(tmp_path / f"{name}.csv", seed=i) for i, name in enumerate("abc")}
    task = make(encoder, files["a"], validation=str(files["b"]), test=str(files["c"]), validation_examples=20)
    assert {name: len(rows) for name, rows in task.parts.items()} == {
        "train": 60,
        "validation": 20,
        "test": 60,
    }


def test_the_order_of_classes_can_be_given(encoder: PretrainedModel, tmp_path: Path) -> None:
    train = write_reviews(tmp_path / "reviews.csv")
    assert make(encoder, train).labels == ("bad", "good")
    assert make(encoder, train, labels=["good", "bad"]).labels == ("good", "bad")


def test_scores(encoder: PretrainedModel, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [f"word {i}" for i in range(50)], "label": [i / 7 - 2 for i in range(50)]})
    frame.to_parquet(tmp_path / "own.parquet")
    task = make(encoder, tmp_path / "own.parquet", score=True)
    assert task.metric == "pearson"
    assert task.build_model(0).config.problem_type == "regression"
    assert task.splits(0).train.labels.dtype == torch.float32
    labels = torch.arange(5.0)
    assert task.metrics(labels.unsqueeze(-1) * 2 + 1, labels)["pearson"] == pytest.approx(1)


def test_metrics_are_their_definitions(encoder: PretrainedModel, tmp_path: Path) -> None:
    task = make(encoder, write_reviews(tmp_path / "reviews.csv"))
    logits = torch.eye(2)[torch.tensor([0, 0, 1, 1, 1])]
    found = task.metrics(logits, torch.tensor([0, 1, 1, 1, 0]))
    f1_of_0, f1_of_1 = 2 * 1 / (2 + 1 + 1), 2 * 2 / (4 + 1 + 1)
    assert found == pytest.approx({"accuracy": 3 / 5, "macro_f1": (f1_of_0 + f1_of_1) / 2})


DOCUMENTED = Path(__file__).parents[2] / "docs" / "tasks.md"
#: a small model in place of the hub's, and fewer runs
SHORTENED = [
    "model.name_or_path=bert",
    "methods=[lora]",
    "tune=null",
    "seeds=[0]",
    "train={epochs: 1, threads: 1}",
    "measures=[cost]",
]


def test_a_study_in_yaml_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the page on tasks, word for word."""
    section = DOCUMENTED.read_text(encoding="utf-8").partition("## Your own texts")[2]
    example = section.partition("```yaml\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "reviews.csv")
    bert_folder(tmp_path / "bert")
    (tmp_path / "reviews.yaml").write_text(example)
    results = store.StudyFolder(tmp_path / "results", "reviews")
    [run] = Plan(load("reviews.yaml", SHORTENED), results).final([])
    directory = results.run(run.id)
    directory.prepare(run.spec())
    assert finish(directory.path) == "done"
    result = directory.result()
    assert result is not None
    assert set(result["metrics"]["test"]) == {"loss", "accuracy", "macro_f1"}


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("words,label\na,b\n", {}, "train: {file}: no column 'text'; it has words, label"),
        ("text,label\n", {}, "train: {file}: no rows"),
        ("", {}, "train: {file}: cannot be read"),
        ("text,label\na,b\n", {}, "column 'label' holds 1 classes; at least two are needed"),
        ("text,label\na,b\n ,c\n", {}, "{file}, row 2: column 'text' is empty or no text"),
        ("text,label\na,b\nc,\n", {"labels": ["b", "c"]}, "{file}, row 2: column 'label': unknown label ''"),
        (
            "text,label\na,b\nc,d\n",
            {"labels": ["b", "c"]},
            "row 2: column 'label': unknown label 'd'; known: b",
        ),
        ("text,label\na,1\nc,high\n", {"score": True}, "row 2: column 'label': 'high' is no number"),
        ("text,label\na,1\nc,inf\n", {"score": True}, "row 2: column 'label': 'inf' is no number"),
        ("text,label\na,1\nc,2\n", {"train_examples": 5}, "examples"),
    ],
)
def test_bad_files(
    encoder: PretrainedModel, tmp_path: Path, content: str, options: dict[str, Any], said: str
) -> None:
    path = tmp_path / "own.csv"
    path.write_text(content)
    assert said.format(file=path) in refused(lambda: make(encoder, path, **options).fingerprint())


def test_files_that_are_not_there_or_not_what_they_seem(encoder: PretrainedModel, tmp_path: Path) -> None:
    assert "train: no such file" in refused(make(encoder, tmp_path / "no.csv").fingerprint)
    (tmp_path / "own.xlsx").write_text("")
    assert "expected a file ending in .csv, .tsv" in refused(make(encoder, tmp_path / "own.xlsx").fingerprint)
    (tmp_path / "own.parquet").write_text("no parquet")
    assert "own.parquet: cannot be read" in refused(make(encoder, tmp_path / "own.parquet").fingerprint)
    (tmp_path / "own.jsonl").write_text("{")
    assert "own.jsonl, line 1: not JSON" in refused(make(encoder, tmp_path / "own.jsonl").fingerprint)
    train = write_reviews(tmp_path / "reviews.csv")
    missing = make(encoder, train, test=str(tmp_path / "gone.csv"))
    assert "test: no such file" in refused(missing.fingerprint)


def test_a_score_has_no_classes(encoder: PretrainedModel, tmp_path: Path) -> None:
    for options in ({"labels": ["a", "b"]}, {"label_noise": 0.1}):
        assert "score: " in refused(lambda o=options: make(encoder, tmp_path, score=True, **o))


@pytest.mark.parametrize("column", ["text", "label"])
def test_nullable_columns_of_pandas(encoder: PretrainedModel, tmp_path: Path, column: str) -> None:
    frame = pd.DataFrame({"text": [f"x{i}" for i in range(60)], "label": [i % 3 for i in range(60)]})
    frame = frame.astype({"text": "string", "label": "Int64"})
    frame.to_parquet(tmp_path / "own.parquet")
    assert make(encoder, tmp_path / "own.parquet").labels == ("0", "1", "2")
    frame.loc[6, column] = pd.NA
    frame.to_parquet(tmp_path / "missing.parquet")
    message = refused(make(encoder, tmp_path / "missing.parquet").fingerprint)
    assert f"missing.parquet, row 7: column '{column}'" in message
