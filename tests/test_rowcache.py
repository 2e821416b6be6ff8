"""A cached table is the table, whatever happened to the runs since."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from flatbench import store
from flatbench.store import RunDirectory, StudyFolder
from tests.test_store import make, place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables"


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> StudyFolder:
    """Two finished runs."""
    folder = StudyFolder(tmp_path, "s")
    runs = [make(folder, seed=seed) for seed in (1, 2)]
    for run in runs:
        run.write("result", {"metrics": {"train": {"loss": 0.5}}, "training": {}})
        run.write("measures/cost", {"config": {}, "values": {"step_ms": 3.0}})
        run.finish(["cost"])
    folder.write({"runs": [place(run) for run in runs]})
    return folder


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    read: list[str] = []
    whole = store.tables._entry

    def counted(path: Path) -> dict[str, object]:
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(store.tables, "_entry", counted)
    return read


def test_what_is_as_it_was_is_not_read_again(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.table(folder)
    read = count_reads(monkeypatch)
    pd.testing.assert_frame_equal(store.table(folder), first)
    assert read == []


CHANGES: dict[str, Callable[[RunDirectory], None]] = {
    "a result of another's hand": lambda run: run.write(
        "result", {"metrics": {"train": {"loss": 0.25}}, "training": {}}
    ),
    "a measure anew": lambda run: run.write("measures/cost", {"config": {}, "values": {"step_ms": 4.0}}),
    "another measure": lambda run: run.write("measures/more", {"config": {}, "values": {"x": 1.0}}),
    "a failure": lambda run: (
        run.forget("done"),
        run.write("failure", {"state": "failed", "error": "E: x"}),
    ),
    "cleared": lambda run: run.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(
    folder: StudyFolder, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = store.table(folder)
    run = folder.directories()[1]
    CHANGES[change](run)
    read = count_reads(monkeypatch)
    after = store.table(folder)
    assert read == [run.id]
    for file in cache.iterdir():
        file.unlink()
    pd.testing.assert_frame_equal(after, store.table(folder))
    assert not after.equals(before)


def test_a_forged_row_is_not_shown(folder: StudyFolder, cache: Path) -> None:
    """Neither one beside the results, where an earlier version kept them, nor one in the cache."""
    first = store.table(folder)
    (file,) = cache.iterdir()
    forged = file.read_text().replace("0.5", "0.9")
    assert forged != file.read_text()
    file.write_text(forged)
    (folder.path / ".table.json").write_text(forged)
    pd.testing.assert_frame_equal(store.table(folder), first)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"sha256": 0, "rows": {}}', "[" * 100_000])
def test_a_damaged_cache_costs_only_time(folder: StudyFolder, cache: Path, damage: str) -> None:
    first = store.table(folder)
    (file,) = cache.iterdir()
    file.write_text(damage)
    pd.testing.assert_frame_equal(store.table(folder), first)
    assert len(json.loads(file.read_text())["rows"]) == 2


def test_runs_without_checksums_are_not_kept(folder: StudyFolder, cache: Path) -> None:
    """An earlier version finished them: nothing tells that they are as they were."""
    for run in folder.directories():
        run.write("done", {"measures": ["cost"]})
    store.table(folder)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(store.table(folder)) == 2
