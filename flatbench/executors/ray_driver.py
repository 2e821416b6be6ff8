"""The process between the ray executor and Ray: it hands runs to a cluster and reports how they end.

Ray takes over signals of the process that uses it, prints between the lines of a study's progress, and ends
that process when a cluster is lost. All of that happens here, in a session of its own: what a terminal or
`timeout` sends to the command's process group does not reach a local cluster before it was asked to save, and
whatever was started can be found and ended by its session.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil

from flatbench.errors import InputError
from flatbench.executors import worker
from flatbench.executors.local import cores
from flatbench.machine import stopping
from flatbench.store import claims

#: bytes; the least that Ray starts with. No data of ours goes through its object store
OBJECT_STORE = 80 * 2**20
#: file in `Settings.folder` with what Ray prints
LOG = "driver.log"
#: seconds to find out whether there is anything at an address
_CONNECT = 10.0
#: seconds that tasks get to end once they were killed
_KILL = 5.0


@dataclass(frozen=True)
class Settings:
    """Settings that the driver receives once.

    Attributes:
        address: of a given cluster; None starts one on this machine.
        folder: what a local cluster writes; removed with it.
        cwd: the working directory of the study, from which its relative paths start.
        num_cpus: cores that a local cluster shares out.
        cpus, gpus, resources: what Ray reserves for each run.
        jobs: runs side by side on a machine, for the record; 0 if only the worker can tell.
        lease: see `flatbench.runs.finish.finish`.
        runtime_env: Ray's runtime environment of a given cluster's workers.
    """

    address: str | None
    folder: Path
    cwd: str
    num_cpus: int
    cpus: int
    gpus: float
    jobs: int
    lease: float
    resources: Mapping[str, float] = field(default_factory=dict)
    runtime_env: Mapping[str, Any] = field(default_factory=dict)

    @property
    def demand(self) -> dict[str, float]:
        """What a node must have for a run, by Ray's names."""
        asked = {"CPU": float(self.cpus), "GPU": self.gpus, **self.resources}
        return {name: amount for name, amount in asked.items() if amount}


def serve(connection: Connection, settings: Settings) -> None:
    """Do what comes through ``connection`` until it says stop, or is closed because its other end is gone.

    It takes ``("submit", paths)`` and ``("stop", grace)``. It sends ``("ready", lines)`` once, or
    ``("refused", reason)``; then for each path ``("ended", path, state, died)`` or ``("raised", error)``.
    """
    os.setsid()
    _redirect(settings.folder / LOG)
    inbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, inbox, settings), daemon=True).start()
    try:
        driver = _Driver(settings, inbox)
        notes = driver.notes()
    except Exception as error:
        connection.send(("refused", one_line(error)))
        _end(settings)
    signal.signal(signal.SIGTERM, lambda *_: _end(settings))  # Ray has set a handler of its own
    connection.send(("ready", notes))
    while True:
        kind, value = inbox.get()
        if kind == "submit":
            driver.submit(value)
        elif kind == "through":
            connection.send(driver.through(*value))
        else:
            driver.stop(value)
            _end(settings)


class _Driver:
    """Tasks of a cluster, one a run."""

    def __init__(self, settings: Settings, inbox: SimpleQueue[tuple[str, Any]]) -> None:
        self.settings, self.inbox = settings, inbox
        self._ray = _connect(settings)
        reserve = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "resources": {**settings.resources}}
        # a run whose worker died is tried again by `Drive`, which waits in between and tells
        self._task = self._ray.remote(max_retries=0, **reserve)(finish)
        self._tasks: dict[str, Any] = {}
        if settings.address is None:
            warm = self._ray.remote(max_retries=0, **reserve)(worker.load)
            self._warm = [warm.remote() for _ in range(settings.jobs)]

    def notes(self) -> list[str]:
        """What the user should know of the cluster."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        lines = []
        if not fits(self.settings.demand, nodes):
            lines.append(
                f"no node of the Ray cluster has what a run asks for ({_amounts(self.settings.demand)}) now; "
                "runs wait until one joins it"
            )
        gpus = sum(node.get("GPU", 0) for node in nodes)
        if gpus and not self.settings.gpus:
            lines.append(
                f"the Ray cluster has {gpus:g} GPUs and executor.gpus_per_run is 0: runs train on the CPU"
            )
        return lines

    def submit(self, paths: Iterable[str]) -> None:
        told = self.settings
        for path in paths:
            # the title of the worker's process while it is at the run
            task = self._task.options(name=f"flatbench-{Path(path).name}")
            ref = task.remote(path, told.cwd, told.cpus, told.jobs, told.lease, told.gpus)
            self._tasks[path] = ref
            ref.future().add_done_callback(
                lambda future, path=path: self.inbox.put(("through", (path, future)))
            )

    def through(self, path: str, future: Any) -> tuple[Any, ...]:
        """What to say of a run whose task has ended."""
        del self._tasks[path]
        error = future.exception()
        if error is None:
            state, stop = future.result()
            return "ended", path, state, stop
        if isinstance(error, self._ray.exceptions.RayTaskError):
            return "raised", _original_exception(error)
        if self.settings.address is None and isinstance(error, _node_failures()):
            _end(self.settings)  # it had one node, which Ray does not replace; the executor starts it anew
        return "ended", path, None, how(error)

    def stop(self, grace: float) -> None:
        """Have runs under way save where they are, so many seconds at most; then end them."""
        begun = {path for path in self._tasks if claims.holder(Path(path)) is not None}
        for path, task in self._tasks.items():
            # SIGINT for one that runs; those that wait, for a node perhaps that never comes, just end
            self._ray.cancel(task, force=path not in begun)
        tasks = [self._tasks[path] for path in begun]
        if tasks:
            _, left = self._ray.wait(tasks, num_returns=len(tasks), timeout=max(grace, 0.1))
            for task in left:
                self._ray.cancel(task, force=True)
            if left:
                self._ray.wait(left, num_returns=len(left), timeout=_KILL)
        if self.settings.address is not None:
            self._ray.shutdown()


def _connect(settings: Settings) -> Any:
    """Ray, connected to the cluster. Raises InputError, or whatever Ray raises for its many reasons."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if settings.address is not None:
        _reach(settings.address)
        options = {"address": settings.address, "runtime_env": {**settings.runtime_env}}
        try:
            ray.init(log_to_driver=False, logging_level="error", **options)
        except ConnectionError as error:
            # it asks for tokens by default, and sends them only if it is told to
            hint = (
                "" if "RAY_AUTH_MODE" in os.environ else " (does it ask for a token? set RAY_AUTH_MODE=token)"
            )
            raise InputError(one_line(error) + hint) from error
        return ray
    ray.init(
        address="local",  # not one that happens to run on this machine
        num_cpus=settings.num_cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=OBJECT_STORE,
        _temp_dir=str(settings.folder),
        # Ray would have its workers give way to every other process of the machine, and runs take longer
        _system_config={"worker_niceness": 0},
    )
    node = ray.cluster_resources()
    if not fits(settings.demand, [node]):
        has = _amounts({name: amount for name, amount in node.items() if name in {"CPU", "GPU"}})
        raise InputError(
            f"a run asks for {_amounts(settings.demand)} and this machine has {has}; ask for less, or name "
            "the executor.address of a cluster that has it"
        )
    return ray


def _reach(address: str) -> None:
    """Raise InputError if nothing listens there, for which Ray takes a long time and many lines."""
    found = re.fullmatch(r"(?:\w+://)?\[?([^/\]]+?)\]?:(\d+)", address)
    if found is None:
        return
    host, port = found.groups()
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"nothing answers there ({error})") from None


def fits(demand: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> bool:
    """Whether one of the nodes, by all that it has, is large enough for a run."""
    return any(all(node.get(name, 0) >= amount for name, amount in demand.items()) for node in nodes)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items())) or "nothing"


def _node_failures() -> tuple[type[Exception], ...]:
    """What a task ends with if its node is gone, or was when the task was to be placed there."""
    from ray import exceptions

    return exceptions.NodeDiedError, exceptions.LocalRayletDiedError


def how(error: BaseException) -> str:
    """How a task ended that did not end by itself, in a few words."""
    from ray import exceptions

    known = {
        exceptions.OutOfMemoryError: "killed by Ray because the memory of its node was used up",
        **dict.fromkeys(_node_failures(), "its node was lost"),
        exceptions.TaskUnschedulableError: "no node of the Ray cluster can take it",
        exceptions.TaskCancelledError: "cancelled in Ray",
        exceptions.WorkerCrashedError: "killed, or crashed",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    return one_line(error)


def _original_exception(error: Any) -> Exception:
    """What was raised in a worker, as it was raised there."""
    cause: Any = error.cause
    if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] == "flatbench":
        return InputError(
            "the workers of the Ray cluster cannot import flatbench: install the same flatbench-lora there, "
            "or name an environment that has it in executor.runtime_env"
        )
    return cause if isinstance(cause, Exception) else RuntimeError(str(error))


def one_line(error: BaseException) -> str:
    """The first line of a message that may be pages long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def finish(path: str, cwd: str, threads: int, jobs: int, lease: float, gpus: float) -> tuple[str, str | None]:
    """A task: the run's state, and what stopped the worker if it was asked to stop."""
    stopping.forget()  # an earlier run of this worker may have been stopped
    with stopping.heeded(patient=True):
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        try:
            os.chdir(cwd)
        except OSError as error:
            raise _sharing_error(cwd) from error
        if not Path(path).is_dir():
            raise _sharing_error(path)
        return worker.finish(path, threads, jobs or max(1, cores() // threads), lease)


def _sharing_error(path: str) -> InputError:
    return InputError(
        f"{path}: not there on {socket.gethostname()}, a node of the Ray cluster; its nodes must see the "
        "working directory and the results under the same paths as this machine"
    )


def end_session(session: int) -> None:
    """Kill every process of a session but the one that calls."""
    deadline = time.monotonic() + _KILL
    while time.monotonic() < deadline:
        members = [process for process in psutil.process_iter() if _is_member(process, session)]
        if not members:
            return
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.02)


def _is_member(process: psutil.Process, session: int) -> bool:
    try:
        ours = os.getsid(process.pid) == session and process.pid != os.getpid()
        return ours and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def _end(settings: Settings) -> None:
    """End this process, and a local cluster with it."""
    if settings.address is None:
        end_session(os.getpid())
    shutil.rmtree(settings.folder, ignore_errors=True)
    os._exit(0)


def _receive(connection: Connection, inbox: SimpleQueue[tuple[str, Any]], settings: Settings) -> None:
    while True:
        try:
            inbox.put(connection.recv())
        except (EOFError, OSError):  # whoever had started this process is gone, however that went
            _end(settings)


def _redirect(log: Path) -> None:
    """Have everything that is printed by this process and those that it starts end in a file."""
    sys.stdout.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def whole_above_one(gpus: float) -> float:
    """Refuse one and a half GPUs: Ray shares out one of them, or whole ones."""
    if gpus > 1 and not math.isclose(gpus, round(gpus)):
        raise ValueError("a part of one GPU, or whole ones")
    return gpus
