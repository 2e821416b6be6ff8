"""A cached table is the table, whatever happened to the runs since."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from flatbench import store
from flatbench.store import RunDirectory, StudyFolder, row_cache
from tests.test_store import make, place


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyFolder:
    """Two finished runs that have lain still for a while."""
    monkeypatch.setattr(row_cache, "_STABLE_SECONDS", -1.0)
    folder = StudyFolder(tmp_path, "s")
    runs = [make(folder, seed=seed) for seed in (1, 2)]
    for run in runs:
        run.write("result", {"metrics": {"train": {"loss": 0.5}}, "training": {}})
        run.write("measures/cost", {"config": {}, "values": {"step_ms": 3.0}})
        run.write("done", {})
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


def test_what_lay_still_is_not_read_again(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.table(folder)
    read = count_reads(monkeypatch)
    pd.testing.assert_frame_equal(store.table(folder), first)
    assert read == []


CHANGES: dict[str, Callable[[RunDirectory], None]] = {
    "a new result": lambda run: run.write("result", {"metrics": {"train": {"loss": 0.25}}, "training": {}}),
    "a measure anew": lambda run: run.write("measures/cost", {"config": {}, "values": {"step_ms": 4.0}}),
    "another measure": lambda run: run.write("measures/more", {"config": {}, "values": {"x": 1.0}}),
    "a failure": lambda run: (
        run.forget("done"),
        run.write("failure", {"state": "failed", "error": "E: x"}),
    ),
    "cleared": lambda run: run.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    before = store.table(folder)
    run = folder.directories()[1]
    time.sleep(0.02)  # more than a tick of the file system's clock
    CHANGES[change](run)
    read = count_reads(monkeypatch)
    after = store.table(folder)
    assert read == [run.id]
    folder.path.joinpath(".table.json").unlink()
    pd.testing.assert_frame_equal(after, store.table(folder))
    assert not after.equals(before)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 0, "rows": {}}'])
def test_a_damaged_cache_costs_only_time(folder: StudyFolder, damage: str) -> None:
    first = store.table(folder)
    (folder.path / ".table.json").write_text(damage)
    pd.testing.assert_frame_equal(store.table(folder), first)
    assert json.loads((folder.path / ".table.json").read_text())["version"] > 0


def test_what_just_changed_is_not_kept(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "_STABLE_SECONDS", 60.0)
    store.table(folder)
    assert not (folder.path / ".table.json").exists()


def test_a_cache_that_cannot_be_written(folder: StudyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(store.table(folder)) == 2
