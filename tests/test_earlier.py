"""A study that goes on from another one's adapters, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from flatbench import cli, store, study
from flatbench.errors import InputError
from flatbench.study import plan
from flatbench.study.earlier import earlier
from tests.conftest import SMALL

METHODS: list[Any] = ["full_ft", "lora", {"name": "sam", "grid": {"lr": [1e-3, 1e-2], "rho": [0.05]}}]


def write(folder: Path, name: str, **changes: Any) -> str:
    content = {**SMALL, "name": name, "methods": METHODS, "measures": [], "seeds": [0, 1], **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return f"{name}.yaml"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tune = {"grid": {"lr": [1e-3, 1e-2]}, "seeds": [7]}
    write(tmp_path, "first", tune=tune, train={**SMALL["train"], "epochs": 1})
    write(
        tmp_path,
        "second",
        after="first.yaml",
        train={**SMALL["train"], "epochs": 1},
        methods=["full_ft", "lora"],
    )
    return tmp_path


@pytest.mark.slow
def test_one_command_runs_both_and_each_method_starts_from_its_own(folder: Path) -> None:
    before = plan.Plan(study.load("second.yaml"), store.StudyFolder(folder / "results", "second")).final([])
    assert [run.config.get("waits_for") for run in before] == [None, None, "first.yaml", "first.yaml"]
    ran = CliRunner().invoke(cli.app, ["run", "second.yaml"])
    assert ran.exit_code == 0, ran.output
    assert ran.output.index("results in results/first") < ran.output.index("results in results/second")
    first, second = (store.StudyFolder(Path("results"), name) for name in ("first", "second"))
    specs = {d.path: d.spec() for d in second.directories()}
    started = {spec["method"]: spec["config"]["adapter"].get("init_from") for spec in specs.values()}
    assert started["full_ft"] is None
    [source] = [
        d
        for d in first.directories()
        if d.spec()["method"] == "lora"
        and d.spec()["config"]["stage"] == "final"
        and d.spec()["config"]["seed"] == 0
    ]
    assert started["lora"] == str(source.adapter)  # of the first seed, for all seeds
    assert not any("waits_for" in spec["config"] for spec in specs.values())
    assert load_file(source.adapter / "adapter_model.safetensors")
    again = CliRunner().invoke(cli.app, ["run", "second.yaml"])
    assert again.exit_code == 0
    assert "0 finished" not in again.output  # nothing is trained twice


def test_a_method_that_the_earlier_study_does_not_have_is_named(folder: Path) -> None:
    write(folder, "third", after="first.yaml", methods=["eflat_lora"])
    first = store.StudyFolder(Path("results"), "first")
    first.prepare()
    first.write({"methods": ["full_ft", "lora"], "runs": [], "seeds": [0]})
    with pytest.raises(InputError, match=r"third\.yaml: after: first\.yaml has no method 'eflat_lora'"):
        plan.Plan(study.load("third.yaml"), store.StudyFolder(Path("results"), "third")).final([])


def test_an_earlier_study_with_several_conditions_is_not_guessed_from(folder: Path) -> None:
    first = store.StudyFolder(Path("results"), "first")
    first.prepare()
    run = {"stage": "final", "method": "lora", "hyper": {}}
    runs = [{**run, "id": "a" * 16, "condition": c} for c in ("task.label_noise=0.0", "task.label_noise=0.4")]
    first.write({"methods": ["lora"], "runs": runs, "seeds": [0]})
    with pytest.raises(InputError, match="2 conditions or configurations of 'lora'"):
        plan.Plan(study.load("second.yaml"), store.StudyFolder(Path("results"), "second")).final([])


def test_studies_in_a_circle_and_unknown_ones_are_refused(folder: Path) -> None:
    write(folder, "a", after="b.yaml")
    write(folder, "b", after="a.yaml")
    with pytest.raises(InputError, match="before itself"):
        earlier("a.yaml")
    write(folder, "c", after="nowhere.yaml")
    with pytest.raises(InputError, match=r"unknown study 'nowhere\.yaml'"):
        earlier("c.yaml")


def test_a_study_reaches_no_other_outside_its_folders(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file from somebody else must not have any study that lies on the machine run."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, "theirs")
    write(folder, "mine", after=str(elsewhere / "theirs.yaml"))
    with pytest.raises(InputError, match=r"mine\.yaml: .*after"):
        earlier("mine.yaml")
    assert earlier("mine.yaml", roots=[elsewhere]) == [(str(elsewhere / "theirs.yaml"), [])]


def test_variables_are_handed_on_and_nothing_else(folder: Path) -> None:
    write(folder, "first", variables={"data": None})
    given = ["variables.data=here", "variables.other=x", "train.epochs=9"]
    assert earlier("second.yaml", given) == [("first.yaml", ["variables.data=here"])]
    assert earlier("first.yaml", given) == []
    assert earlier("paper-glue-from-mnli") == [("paper-glue-mnli", [])]
