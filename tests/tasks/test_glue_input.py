"""GLUE: every layout of files, the hub, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from flatbench import store
from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.runs.finish import finish
from flatbench.study import Study
from flatbench.study.plan import Plan
from flatbench.tasks.text import glue_data
from flatbench.tasks.text.glue import Glue
from tests.tasks.glue_cases import PAIR, make, write_stsb
from tests.tasks.task_cases import bert_folder, write_tsv


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(bert_folder(tmp_path_factory.mktemp("encoder") / "bert")))


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
    assert finish(directory.path) == "done"
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
