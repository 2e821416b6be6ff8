"""What a task cut or did not find enough of is said by run, show and report, and not only stored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from transformers import BertForMaskedLM
from typer.testing import CliRunner

from flatbench import cli
from flatbench.errors import InputError
from flatbench.store import StudyFolder
from flatbench.store.notes import notes
from flatbench.study import Study
from flatbench.study.plan import Plan
from tests.tasks.task_cases import WORDS, bert_folder, clip_folder, write_images, write_rte


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, []),
        ({"truncated": {"train": 0, "test": 0}, "fewer_than_shots": {"train": {}}, "incomplete_rows": 0}, []),
        ({"truncated": {"train": 2, "test": 1}, "examples": {"train": 9, "test": 5}, "max_length": 8},
         ["2 of 9 train texts were cut at max_length 8", "1 of 5 test texts were cut at max_length 8"]),
        ({"truncated_prompts": 3}, ["3 class prompts were cut at the model's number of tokens"]),
        ({"fewer_than_shots": {"train": {"a": 1, "b": 2}, "validation": {"a": 0}}},
         ["fewer examples than shots for train: a (1), b (2)",
          "fewer examples than shots for validation: a (0)"]),
        ({"fewer_than_shots": {"train": {str(i): 1 for i in range(8)}}},
         ["fewer examples than shots for train: 0 (1), 1 (1), 2 (1), 3 (1), 4 (1) and 3 more classes"]),
        ({"unlabelled_rows": 785, "incomplete_rows": 1},
         ["1 rows of the files without a text were left out",
          "785 rows of the files without an agreed label were left out"]),
        ({"also_in_validation": {"test": 4}, "examples": {"test": 9}},
         ["4 of 9 test examples are in validation as well: what is chosen there is chosen on them"]),
        ({"classes": ["neg", "pos", "pos ", "Neg"]},
         ["the classes 'neg', 'Neg' differ in case or blanks alone",
          "the classes 'pos', 'pos ' differ in case or blanks alone"]),
        ({"truncated": True, "fewer_than_shots": "none"}, []),  # a third party's own entries
    ],
)  # fmt: skip
def test_notes(data: dict[str, object], expected: list[str]) -> None:
    assert notes(data) == expected


@pytest.mark.slow
def test_run_show_and_report_say_which_classes_had_fewer_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_images(tmp_path / "data", {"train": 12, "test": 2})
    for number in range(6):
        (data / "train" / "c" / f"{number}.png").unlink()
    study = {
        "name": "few",
        "task": {"name": "clip_classification", "shots": 8, "template": f"{{}} {'a' * 80}",
                 "data": str(data)},
        "model": {"name_or_path": str(clip_folder(tmp_path / "clip"))},
        "adapter": {"r": 2},
        "methods": ["lora", "eflat_lora"],
        "seeds": [0],
        "train": {"epochs": 1, "threads": 1},
        "measures": ["cost"],
    }  # fmt: skip
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    outputs = {
        command[0]: CliRunner().invoke(cli.app, [*command], catch_exceptions=False).output
        for command in (["show", "few.yaml"], ["run", "few.yaml"], ["report", "few.yaml"])
    }
    again = CliRunner().invoke(cli.app, ["show", "few.yaml"]).output
    assert outputs["show"].count("fewer examples than shots for train: c (6)") == 1  # before anything is run
    for output in (outputs["run"], outputs["report"], again):
        assert output.count("fewer examples than shots for train: c (6)") == 1
        assert output.count("3 class prompts were cut at the model's number of tokens") == 1
    report = (tmp_path / "reports" / "few" / "README.md").read_text()
    assert "fewer examples than shots for train: c (6)" in report


def test_a_refusal_names_condition_task_and_field(tmp_path: Path) -> None:
    """Of several conditions the one that cannot be had, whatever the field."""
    data, model = write_rte(tmp_path / "data"), bert_folder(tmp_path / "bert", BertForMaskedLM, WORDS)
    content = {
        "name": "few",
        "task": {
            "name": "prompt_classification",
            "task": "rte",
            "data": str(data),
            "max_length": 48,
            "shots": 4,
        },
        "model": {"name_or_path": str(model)},
        "methods": ["lora"],
        "seeds": [0],
    }
    folder = StudyFolder(tmp_path / "results", "few")
    for grid, wanted in (
        (
            {"task.shots": [4, 30]},
            "few.yaml: condition task.shots=30: task: prompt_classification: shots: 30",
        ),
        (
            {"task.max_length": [48, 500]},
            "condition task.max_length=500: task: prompt_classification: max_length",
        ),
        (
            {"task.task": ["rte", "sst2"]},
            "condition task.task=sst2: task: prompt_classification: data: no such",
        ),
        ({"adapter.init_from": [str(data)]}, f"{data}: task: prompt_classification: adapter.init_from"),
    ):
        with pytest.raises(InputError, match=re.escape(wanted)):
            Plan(Study({**content, "grid": grid}, "few.yaml"), folder).final([])
    chosen = {
        **content,
        "tune": {"metric": "bleu", "seeds": [1], "grid": {"lr": [1e-3]}},
        "grid": {"task.shots": [4, 5]},
    }
    with pytest.raises(InputError, match=r"condition task.shots=4: task: prompt_classification: tune.metric"):
        Plan(Study(chosen, "few.yaml"), folder)
    short = Plan(Study({**content, "grid": {"task.shots": [4, 20]}}, "few.yaml"), folder).notes
    assert short == [
        "task.shots=20: fewer examples than shots for validation: entailment (10), not_entailment (10)"
    ]
