"""The local executor loses nothing when its workers die."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flatbench.errors import FlatbenchError
from flatbench.executors.local import Local
from flatbench.machine import forking
from flatbench.orchestration.queue import Drive
from flatbench.store import RunDirectory, events
from tests.executors.studies import assert_no_step_twice, happened, prepared, weights
from tests.holds import Hold, until

pytestmark = pytest.mark.slow


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hold]:
    """Heeded by workers that are started from now on."""
    found = Hold(tmp_path_factory.mktemp("holds") / "holds")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in found.environment().items():
            patch.setenv(key, value)
        yield found


@pytest.fixture(scope="module")
def local(hold: Hold) -> Iterator[Local]:
    """Two workers for all tests of this file: whatever was done to them, the executor goes on to work."""
    before = {worker.pid for worker in workers()}
    with pytest.MonkeyPatch.context() as patch:
        # workers that start anew, as where there is a GPU: `test_chaos` has those that are forked
        patch.setattr(forking, "start_method", lambda: "spawn")
        yield from started(before)


def started(before: set[int]) -> Iterator[Local]:
    with Local(jobs=2) as executor:
        executor.warm()
        yield executor
    assert {worker.pid for worker in workers()} == before


@pytest.fixture(autouse=True)
def nothing_is_held(hold: Hold) -> Iterator[None]:
    yield
    hold.open()


def driven(local: Local, directories: list[RunDirectory], meanwhile: Callable[[], None]) -> list[str]:
    """How runs end while something is done to them in another thread, whose error is raised here."""
    raised: list[BaseException] = []

    def do() -> None:
        try:
            meanwhile()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    ends = [end.state for end in Drive(local, backoff=0.1).run([d.path for d in directories])]
    thread.join()
    if raised:
        raise raised[0]
    return ends


def test_a_worker_that_dies_between_runs_is_replaced(tmp_path: Path, local: Local) -> None:
    idle, _ = workers()
    idle.kill()
    # until the executor has seen it, and waited for it
    until("the end of a worker", lambda: not psutil.pid_exists(idle.pid))
    directories = prepared(tmp_path)
    ends = [end.state for end in Drive(local, retries=0).run([d.path for d in directories])]
    assert ends == ["done"] * 4
    assert "worker died" not in happened(*directories)


def test_a_function_is_called_in_a_process_of_its_own() -> None:
    """As every executor but this one has a study planned."""
    one = Local(jobs=1)
    assert one.call(os.getpid) != os.getpid()
    assert one.call(os.getcwd) == os.getcwd()
    with pytest.raises(FlatbenchError, match="the process that was to plan the study died"):
        one.call(os._exit, 3)


def test_a_killed_worker_costs_nobody_a_run(
    tmp_path: Path, local: Local, hold: Hold, undisturbed_weights: dict[str, str]
) -> None:
    directories = prepared(tmp_path)
    hold.close("epoch")

    def kill() -> None:
        victim, _ = hold.wait(2)
        os.kill(victim.pid, signal.SIGKILL)
        hold.open()

    assert driven(local, directories, kill) == ["done"] * 4
    (died,) = [e for d in directories for e in events.read(d.path) if e["event"] == "worker died"]
    assert died["how"] == "killed by SIGKILL"
    assert happened(*directories).count("resumed") == 1
    assert happened(*directories).count("trained") == 4
    assert weights(directories) == undisturbed_weights
    assert_no_step_twice(*directories)


def test_a_worker_asked_to_stop_while_it_measures_stops_no_study(
    tmp_path: Path, local: Local, hold: Hold
) -> None:
    measure = {"name": "sam_sharpness", "examples": 10, "steps": 1}
    directories = prepared(tmp_path, epochs=1, measures=[measure], seeds=[0])
    hold.close(write="sam_sharpness*.json")
    stopped: list[Path] = []

    def stop() -> None:
        victim, _ = hold.wait(2)
        stopped.append(victim.run.parent)  # the measure's file lies in measures/
        os.kill(victim.pid, signal.SIGTERM)
        hold.open()

    assert driven(local, directories, stop) == ["done", "done"]
    said = {event["event"]: event for event in events.read(stopped[0])}
    assert said["worker died"]["how"] == "stopped by SIGTERM"
    assert said["stopped"]["by"] == "stopped by SIGTERM"
    assert happened(*directories).count("trained") == 2
    assert happened(*directories).count("worker died") == 1
