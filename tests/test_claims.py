"""A run is one process's at a time, whoever dies, sleeps or shares the folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flatbench.errors import InputError
from flatbench.store import RunDirectory, claims
from tests.holds import PATIENCE, until


def claim_of_another_machine(folder: Path, age: float, lease: float = 1000) -> Path:
    """A claim whose process cannot be looked at from here, last renewed ``age`` seconds ago."""
    claim = claims.take(folder, lease)
    assert claim is not None
    content = {**claim.holder.__dict__, "place": "elsewhere", "token": "other"}
    claim.release()
    path = folder / "claim-000001.json"
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_run_under_way_is_not_called_interrupted(tmp_path: Path) -> None:
    """Who asks for its measures would begin it a second time."""
    directory = RunDirectory(tmp_path)
    with claims.claimed(tmp_path), pytest.raises(InputError, match="is being trained now"):
        directory.trained_result()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="not trained yet"):
        directory.trained_result()


def contend(folder: str, barrier: object, rounds: int, held: str) -> None:
    for i in range(rounds):
        barrier.wait()  # type: ignore[attr-defined]
        with claims.claimed(Path(folder)) as claim:
            if claim is not None:
                # O_EXCL fails if two are in here at once
                path = Path(held) / f"{i}"
                os.close(os.open(path, os.O_CREAT | os.O_EXCL))
                time.sleep(0.002)
                path.unlink()
                (Path(held) / f"{i}-{os.getpid()}").touch()


def test_one_of_many_gets_it(tmp_path: Path) -> None:
    run, held = tmp_path / "run", tmp_path / "held"
    run.mkdir()
    held.mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [
        context.Process(target=contend, args=(str(run), barrier, 50, str(held)), daemon=True)
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert worker.exitcode == 0
    assert {path.name.split("-")[0] for path in held.iterdir()} == {str(i) for i in range(50)}
    assert not list(run.iterdir())


@pytest.mark.slow
def test_a_living_claim_is_respected_and_a_dead_process_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from flatbench.store import claims; "
        f"claims.take(Path({str(tmp_path)!r})); print('mine', flush=True); time.sleep(3600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    assert claims.take(tmp_path) is None
    found = claims.holder(tmp_path)
    assert found is not None
    assert found.pid == process.pid
    os.kill(process.pid, signal.SIGKILL)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert claims.holder(tmp_path) is None  # not even reaped yet
    claim = claims.take(tmp_path)
    assert claim is not None
    assert claim.after is not None
    assert claim.after.pid == process.pid
    assert claim.path.name == "claim-000002.json"
    claim.release()
    process.wait()
    assert not list(tmp_path.iterdir())


def test_another_machines_claim_is_taken_over_after_its_lease(tmp_path: Path) -> None:
    path = claim_of_another_machine(tmp_path, age=90)
    assert claims.take(tmp_path) is None
    os.utime(path, (time.time() - 1100,) * 2)
    claim = claims.take(tmp_path)
    assert claim is not None
    assert not path.exists()
    claim.release()


def test_a_claim_of_which_nothing_can_be_read_lasts_a_lease(tmp_path: Path) -> None:
    path = tmp_path / "claim-000001.json"
    path.write_text("")
    assert claims.take(tmp_path, lease=50) is None
    os.utime(path, (time.time() - 60,) * 2)
    claim = claims.take(tmp_path, lease=50)
    assert claim is not None
    claim.release()


@pytest.mark.slow
def test_it_is_renewed_while_work_goes_on(tmp_path: Path) -> None:
    with claims.claimed(tmp_path, lease=6) as claim:
        assert claim is not None
        content = json.dumps({**claim.holder.__dict__, "place": "elsewhere"})
        claim.path.write_text(content)  # as seen from another machine
        for _ in range(2):
            old = time.time() - 5
            os.utime(claim.path, (old, old))
            until("a renewal", lambda: claim.path.stat().st_mtime > old + 1)  # noqa: B023 - called here
            assert claims.take(tmp_path) is None
        claim.check()


def test_a_process_that_slept_through_its_lease_lets_go(tmp_path: Path) -> None:
    slept = claims.take(tmp_path, lease=1000)
    assert slept is not None
    slept.path.write_text(json.dumps({**slept.holder.__dict__, "place": "elsewhere"}))
    os.utime(slept.path, (time.time() - 2000,) * 2)
    later = claims.take(tmp_path)
    assert later is not None
    with pytest.raises(claims.ClaimLostError, match="taken over by another process"):
        slept.check()
    later.check()
    slept.release()  # which must not release what is another's
    later.check()
    later.release()
    # the number is free again; the sleeper does not take another's claim of its number for its own
    third = claims.take(tmp_path)
    assert third is not None
    assert third.path == slept.path
    assert not slept.holds()
    third.release()


def test_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    claim = claims.take(tmp_path)
    assert claim is not None
    assert claims.take(tmp_path) is None
    claim.release()
    assert not list(tmp_path.iterdir())
