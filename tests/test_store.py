"""Files are written whole or not at all, and the table says what the directories hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flatbench import store
from flatbench.errors import InputError
from flatbench.store import RunDirectory, StudyFolder

CONFIG: dict[str, Any] = {
    "task": {"name": "digits"},
    "model": {},
    "adapter": {"name": "lora"},
    "optimizer": {"name": "sam", "rho": 0.1},
    "train": {"lr": 0.01},
    "seed": 3,
    "stage": "final",
}


def spec(**changes: Any) -> dict[str, Any]:
    return {
        "study": "s",
        "condition": "",
        "method": "sam",
        "metric": "accuracy",
        "hyper": {"lr": 0.01, "rho": 0.1},
        "config": {**CONFIG, **changes},
        "data": "abc",
        "measures": {"cost": {"name": "cost"}},
    }


def make(folder: StudyFolder, **changes: Any) -> RunDirectory:
    content = spec(**changes)
    directory = folder.run(store.run_id(content["config"], content["data"]))
    directory.prepare(content)
    return directory


def place(directory: RunDirectory, **changes: Any) -> dict[str, Any]:
    """An entry of a study's list of runs."""
    own = {"condition": "", "method": "sam", "stage": "final", "hyper": {"lr": 0.01, "rho": 0.1}}
    return {"id": directory.id, **own, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> StudyFolder:
    return StudyFolder(tmp_path, "s")


def test_identity_is_the_configuration_and_the_data() -> None:
    assert store.run_id(CONFIG, "abc") == store.run_id(dict(reversed(CONFIG.items())), "abc")
    assert store.run_id(CONFIG, "abc") != store.run_id({**CONFIG, "seed": 4}, "abc")
    assert store.run_id(CONFIG, "abc") != store.run_id(CONFIG, "abd")


def test_states(folder: StudyFolder) -> None:
    directory = make(folder)
    assert directory.state() == "planned"
    directory.state_file.write_bytes(b"")
    assert directory.state() == "interrupted"
    directory.write("result", {"metrics": {}, "training": {}})
    assert directory.state() == "trained"
    directory.write("failure", {"state": "diverged", "error": "x"})
    assert directory.state() == "diverged"
    directory.forget("failure")
    directory.write("done", {})
    assert directory.state() == "done"
    directory.clear()
    assert directory.state() == "planned"
    assert directory.spec() == spec()


def test_pending_measures(folder: StudyFolder) -> None:
    directory = make(folder)
    assert directory.pending_measures(directory.spec()) == {"cost": {"name": "cost"}}
    directory.write("measures/cost", {"config": {"name": "cost", "old": 1}, "values": {}})
    assert directory.pending_measures(directory.spec()) == {"cost": {"name": "cost"}}
    directory.write("measures/cost", {"config": {"name": "cost"}, "values": {}})
    assert directory.pending_measures(directory.spec()) == {}


def test_a_folder_that_is_no_run(tmp_path: Path, folder: StudyFolder) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        RunDirectory(tmp_path / "nothing").spec()
    directory = make(folder)
    moved = directory.path.rename(directory.path.parent / "0123456789abcdef")
    with pytest.raises(InputError, match="does not belong"):
        RunDirectory(moved).spec()
    (moved / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        RunDirectory(moved).spec()


def test_table(folder: StudyFolder) -> None:
    done, failed, planned = make(folder), make(folder, seed=4), make(folder, seed=5)
    done.write(
        "result",
        {"metrics": {"train": {"loss": 0.5}, "test": {"accuracy": 0.9, "loss": None}}, "training": {}},
    )
    done.write("measures/cost", {"config": {"name": "cost"}, "values": {"step_ms": 3.0, "all": [1, 2]}})
    done.write("measures/hessian", {"config": {"name": "hessian"}, "skipped": "no adapter"})
    done.write("done", {})
    failed.write("failure", {"state": "failed", "error": "RuntimeError: boom", "traceback": "…"})
    folder.write({"runs": [place(d) for d in (done, failed, planned)]})
    table = store.table(folder)
    assert list(table["state"]) == ["done", "failed", "planned"]
    assert list(table["seed"]) == [3, 4, 5]
    row = table.iloc[0]
    assert row["hyper.rho"] == 0.1
    assert row["train.loss"] == 0.5
    assert row["test.accuracy"] == 0.9
    assert row["cost.step_ms"] == 3.0
    assert "cost.all" not in table
    assert row["hessian.skipped"] == "no adapter"
    assert table.iloc[1]["error"] == "RuntimeError: boom"


def test_history_and_slices(folder: StudyFolder) -> None:
    directory, other = make(folder), make(folder, seed=4)
    folder.write({"runs": [place(d) for d in (directory, other)]})
    assert store.history(folder).empty
    assert store.slices(folder).empty
    directory.write_history([{"step": 1, "loss": 0.5}, {"step": 1, "validation.accuracy": 0.75}])
    directory.write(
        "measures/slice",
        {"config": {}, "values": {"positions": [-1.0, 0.0], "losses": [[2.0, 1.0], [3.0, 1.0]]}},
    )
    history = store.history(folder)
    assert list(history["loss"].dropna()) == [0.5]
    assert set(history["run"]) == {directory.id}
    slices = store.slices(folder)
    assert list(slices["loss"]) == [2.0, 1.0, 3.0, 1.0]
    assert list(slices["direction"]) == [0, 0, 1, 1]


def test_one_run_in_two_places(folder: StudyFolder) -> None:
    """Full fine-tuning in a sweep over ranks is one run and stands in the table at every rank."""
    shared = make(folder)
    shared.write_history([{"step": 1, "loss": 0.5}])
    folder.write({"runs": [place(shared, condition="r=2"), place(shared, condition="r=4", method="other")]})
    assert list(store.table(folder)["condition"]) == ["r=2", "r=4"]
    assert list(store.table(folder)["method"]) == ["sam", "other"]
    assert list(store.history(folder)["condition"]) == ["r=2", "r=4"]
    assert [d.id for d in folder.directories()] == [shared.id]


@pytest.mark.parametrize("content", ["{}", "[]", '{"runs": 3}'])
def test_a_damaged_index(folder: StudyFolder, content: str) -> None:
    folder.prepare()
    folder.file.write_text(content)
    with pytest.raises(InputError, match="lists no runs"):
        store.table(folder)


def test_damaged_results(folder: StudyFolder) -> None:
    directory = make(folder)
    directory.write("result", [])
    with pytest.raises(InputError, match=r"result\.json: damaged"):
        directory.result()
    (directory.path / "history.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"history\.parquet: damaged"):
        store.history_of(directory)


def test_no_results(folder: StudyFolder) -> None:
    with pytest.raises(InputError, match="no results"):
        store.table(folder)


def test_environments_are_told_apart(folder: StudyFolder) -> None:
    one, two, other = make(folder), make(folder, seed=4), make(folder, seed=5)
    folder.write({"runs": [place(d) for d in (one, two, other)]})
    assert store.environments(folder) == []
    for directory, threads in ((one, 1), (two, 1), (other, 2)):
        directory.write("environment", {"threads": threads})
    assert store.environments(folder) == [
        {"threads": 1, "runs": [one.id, two.id]},
        {"threads": 2, "runs": [other.id]},
    ]
