"""Nothing damaged reaches a table, and a damaged run is made whole by running its study again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from flatbench import cli, store
from flatbench.errors import InputError
from flatbench.report.analysis.results import Results
from flatbench.report.text import remarks
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory, StudyFolder, checksums, events
from tests.report import synthetic
from tests.test_runner import prepared
from tests.test_store import make, place

FILES = (
    "run.json",
    "environment.json",
    "result.json",
    "history.parquet",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "measures/cost.json",
    "measures/slice.json",
    "done.json",
)


def _json(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        return json.dumps(change(json.loads(content))).encode()

    return damage


def _first_digit(content: bytes) -> bytes:
    """Another first digit: as many bytes, and still what it was to a parser."""
    at = next((i for i, byte in enumerate(content) if chr(byte).isdigit()), 0)
    return content[:at] + (b"7" if content[at : at + 1] != b"7" else b"3") + content[at + 1 :]


WAYS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "a byte short": lambda content: content[:-1],
    "a byte longer": lambda content: content + b" ",
    "a bit flipped": lambda content: (
        content[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
    "another digit": _first_digit,
    "zeros": lambda content: bytes(len(content)),
    "an empty mapping": lambda content: b"{}",
    "another's": lambda content: b'{"metrics": {"test": {"accuracy": 1.0}}, "training": {}}',
}


def study(root: Path) -> StudyFolder:
    """Three finished runs, whose files were written a while ago."""
    folder = StudyFolder(root, "s")
    runs = [make(folder, seed=seed) for seed in (1, 2, 3)]
    for number, run in enumerate(runs):
        run.write("environment", {"device": "cpu", "threads": 1})
        run.write_history([{"step": 1, "loss": 0.5}])
        run.adapter.mkdir()
        (run.adapter / "adapter_model.safetensors").write_bytes(b"0.123 weights")
        (run.adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
        metrics = {"train": {"loss": 0.5}, "test": {"accuracy": 0.5 + 0.1 * number}}
        run.write("result", {"metrics": metrics, "training": {}})
        run.write("measures/cost", {"config": {"name": "cost"}, "values": {"step_ms": 3.0}})
        values = {"positions": [-1.0, 0.0], "losses": [[2.0, 1.0]]}
        run.write("measures/slice", {"config": {"name": "slice"}, "values": values})
        for name in checksums.files_of(run.path):
            os.utime(run.path / name, ns=(10**18, 10**18))
        run.finish(["cost", "slice"])
    folder.write({"runs": [place(run) for run in runs]})
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_file_damaged_in_every_way(way: str, tmp_path: Path) -> None:
    folder = study(tmp_path)
    whole, history, slices = store.table(folder), store.history(folder), store.slices(folder)
    for number, name in enumerate(FILES):
        run = folder.directories()[(number + list(WAYS).index(way)) % 3]  # each is first, last and between
        assert set(FILES) == {*checksums.files_of(run.path), "done.json"}
        path = run.path / name
        content = path.read_bytes()
        changed = WAYS[way](content)
        path.unlink() if changed is None else path.write_bytes(changed)
        table = store.table(folder)
        others = table["run"] != run.id
        pd.testing.assert_frame_equal(
            table[others].drop(columns="error"),
            whole[others].drop(columns="error"),
            check_dtype=False,
            check_like=True,  # a damaged run that is the first has no columns of results
        )
        if changed != content:
            (row,) = table[~others].to_dict("records")
            if row["state"] == "damaged":
                assert name == "done.json" or name.rpartition("/")[2] in row["error"]
                assert row.get("test.accuracy") is None or pd.isna(row["test.accuracy"])
                assert run.id not in set(store.history(folder)["run"])
                assert run.id not in set(store.slices(folder)["run"])
            else:  # done.json says nothing of the results
                assert name == "done.json"
                assert row["state"] in ("trained", "done")
                pd.testing.assert_frame_equal(table.drop(columns="state"), whole.drop(columns="state"))
        path.write_bytes(content)
        os.utime(path, ns=(10**18, 10**18))
        pd.testing.assert_frame_equal(store.table(folder), whole)
        pd.testing.assert_frame_equal(store.history(folder), history)
        pd.testing.assert_frame_equal(store.slices(folder), slices)


@pytest.mark.parametrize("way", WAYS)
def test_a_list_of_runs_damaged_in_every_way(way: str, tmp_path: Path) -> None:
    folder = study(tmp_path)
    whole = store.table(folder)
    content = folder.file.read_bytes()
    changed = WAYS[way](content)
    folder.file.unlink() if changed is None else folder.file.write_bytes(changed)
    try:
        found = store.table(folder)
    except InputError as error:
        assert "study.json: damaged" in str(error)
        assert way not in ("deleted", "a byte longer")
    else:  # without it, run directories are read; what is no value changes nothing
        by_id = [frame.sort_values("run", ignore_index=True)[sorted(whole)] for frame in (found, whole)]
        pd.testing.assert_frame_equal(*by_id)


def test_a_copy_of_another_time_is_whole(tmp_path: Path) -> None:
    folder = study(tmp_path / "a")
    shutil.copytree(folder.path, tmp_path / "b" / "s", copy_function=shutil.copyfile)
    copy = StudyFolder(tmp_path / "b", "s")
    pd.testing.assert_frame_equal(store.table(copy), store.table(folder))


def test_what_keeps_size_and_time_is_found_by_verifying(tmp_path: Path) -> None:
    folder = study(tmp_path)
    path = folder.directories()[0].path / "result.json"
    path.write_bytes(_first_digit(path.read_bytes()))
    os.utime(path, ns=(10**18, 10**18))
    assert "damaged" not in set(store.table(folder)["state"])
    with checksums.verifying():
        assert list(store.table(folder)["state"]) == ["damaged", "done", "done"]


FORGED: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"test": {"accuracy": "0.9"}}, "metrics.test.accuracy: '0.9' is no finite number"),
    "a list": ({"test": {"accuracy": [1]}}, r"metrics.test.accuracy: \[1\] is no finite number"),
    "NaN": ({"test": {"accuracy": float("nan")}}, "metrics.test.accuracy: nan is no finite number"),
    "a switch": ({"test": {"accuracy": True}}, "metrics.test.accuracy: True is no finite number"),
    "infinite": ({"train": {"loss": float("inf")}}, "metrics.train.loss: inf is no finite number"),
    "out of range": ({"test": {"accuracy": 7.5}}, "metrics.test.accuracy: 7.5 is not within 0 and 1"),
    "below range": ({"test": {"matthews": -1.5}}, "metrics.test.matthews: -1.5 is not within -1 and 1"),
    "no mapping": ({"test": 3}, "no mapping of splits"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("kind", FORGED)
def test_metrics_that_are_none_are_refused(kind: str, tmp_path: Path) -> None:
    """In results that an earlier version wrote, without checksums."""
    metrics, message = FORGED[kind]
    run = make(StudyFolder(tmp_path, "s"))
    (run.path / "result.json").write_text(json.dumps({"metrics": metrics, "training": {}}))
    run.write("done", {"measures": []})
    with pytest.raises(InputError, match=message):
        run.result()
    assert run.state() == "damaged"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eigenvalue_1": "large"}, "values.eigenvalue_1: 'large' is text"),
        ({"own": "12.5"}, "values.own: '12.5' is text"),
        ({"sharpness": float("nan")}, "values.sharpness: nan is no finite"),
        ({"losses": [[1.0, float("inf")]]}, "values.losses: inf is no finite"),
        ([1], "values: no mapping"),
    ],
)
def test_measures_that_are_none_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path, "s")
    run = make(folder)
    run.write("result", {"metrics": {"test": {"accuracy": 0.5}}, "training": {}})
    run.path.joinpath("measures").mkdir()
    (run.path / "measures/cost.json").write_text(json.dumps({"config": {"name": "cost"}, "values": values}))
    run.write("done", {"measures": ["cost"]})
    folder.write({"runs": [place(run)]})
    (row,) = store.table(folder).to_dict("records")
    assert row["state"] == "damaged"
    assert message in row["error"]
    spec = run.spec()["config"]
    assert (row["seed"], row["stage"]) == (spec["seed"], spec["stage"])
    assert row["optimizer"] == spec["optimizer"]["name"]
    assert run.pending_measures(run.spec()) == {"cost": {"name": "cost"}}


def test_a_report_names_what_it_leaves_out(tmp_path: Path) -> None:
    folder = synthetic.make(tmp_path)
    final = Results.load(folder).final
    lost, kept = final["run"].iloc[0], final["run"].iloc[1:]
    folder.run(lost).path.joinpath("result.json").write_text("{")
    found = Results.load(folder)
    assert list(found.final["run"]) == list(kept)
    (said,) = [note for note in remarks.notes(found) if "damaged" in note]
    assert lost in said
    assert "result.json" in said
    assert "1 of 3 final runs are not finished" in " ".join(remarks.notes(found))


def test_a_run_that_has_lost_its_configuration(tmp_path: Path) -> None:
    folder = synthetic.make(tmp_path)
    lost = Results.load(folder).final["run"].iloc[0]
    folder.run(lost).path.joinpath("run.json").write_text("{")
    found = Results.load(folder)
    assert lost not in set(found.final["run"])
    assert found.final["seed"].dtype == int
    assert any(lost in note for note in remarks.notes(found))


@pytest.mark.parametrize(
    "change",
    [{"measures": None}, {"measures": {"hessian": None}}, {"measures": {"hessian": {}}}, {"hyper": []},
     {"method": 3}, {"condition": None}],
    ids=str,
)  # fmt: skip
def test_what_the_id_of_a_run_does_not_vouch_for(change: dict[str, Any], tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    spec = directory.spec()
    (directory.path / "run.json").write_text(json.dumps({**spec, **change}))
    with pytest.raises(InputError, match=r"run\.json: damaged \("):
        directory.spec()


def test_a_damaged_list_of_runs(tmp_path: Path) -> None:
    folder = study(tmp_path)
    content = folder.read()
    forged = {**content, "runs": content["runs"][:2], "sha256": "0"}
    # json reads what no file of ours holds
    for damaged in ("", "{", json.dumps(forged), json.dumps({**forged, "study": float("nan")})):
        folder.file.write_text(damaged)
        with pytest.raises(InputError, match=r"damaged .*make it anew with `flatbench run`, or remove it"):
            folder.read()
    folder.write(content)
    assert folder.read() == content


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = prepared(tmp_path_factory.mktemp("trained"))
    assert finish(directory.path) == "done"
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "retrained"),
    [
        ("measures/cost.json", False),
        ("done.json", False),
        ("result.json", True),
        ("history.parquet", True),
        ("adapter/adapter_model.safetensors", True),
    ],
)
def test_finishing_makes_it_whole(name: str, retrained: bool, trained: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / trained.id)
    shutil.copytree(trained.path, copy.path)
    path = copy.path / name
    path.write_bytes(path.read_bytes()[:-3])
    assert copy.state() == "damaged"
    assert not copy.settled()
    assert finish(copy.path) == "done"
    assert copy.state() == "done"
    if not retrained:  # a run that is cleared has lost its events too
        happened = [event["event"] for event in events.read(copy.path)]
        assert happened.count("trained") == 1
        assert "damaged" in happened
    before, after = trained.result(), copy.result()
    assert before is not None
    assert after is not None
    assert after["metrics"] == before["metrics"]
    assert after["weights"] == before["weights"]
    assert (after["training"] != before["training"]) == retrained  # it holds seconds


@pytest.mark.slow
def test_a_study_that_is_run_again_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import SMALL

    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(json.dumps({**SMALL, "methods": ["lora"], "seeds": [0, 1]}))

    def command(*arguments: str) -> str:
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, done.output
        return " ".join(done.output.split())

    command("run", "small.yaml")
    folder = StudyFolder(Path("results"), "small")
    first, second = folder.directories()
    whole = store.table(folder)
    (first.path / "result.json").unlink()
    (second.path / "run.json").write_text("{")
    assert "2 damaged" in command("status", "small.yaml", "--verify")
    folder.file.write_text("")
    said = command("run", "small.yaml")
    assert f"{first.id}: damaged (result.json is missing); it is made anew" in said
    assert "2 runs: 2 done" in said
    columns = [c for c in whole.columns if c.split(".")[0] in ("state", "run", "train", "validation", "test")]
    pd.testing.assert_frame_equal(store.table(folder)[columns], whole[columns])
