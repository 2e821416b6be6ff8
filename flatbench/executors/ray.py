"""Runs as tasks of a Ray cluster: a given one, or one that is started on this machine for the study."""

from __future__ import annotations

import importlib.util
import logging
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from flatbench.config.sections import MOST_THREADS
from flatbench.errors import InputError
from flatbench.executors import ray_driver
from flatbench.executors.base import Ended, Executor, own_variables
from flatbench.executors.local import cores

_log = logging.getLogger(__name__)

#: seconds in which Ray must have started or answered
_START = 120.0
#: seconds that the driver gets to end, beside those in which runs are saved
_END = 20.0
#: characters of a folder's name below which Ray's sockets still have names that the system allows
_SHORT = 30


def _custom(resources: dict[str, float]) -> dict[str, float]:
    """Refuse names that have an option of their own, and amounts that are none."""
    for name, amount in resources.items():
        if name in ("CPU", "GPU"):
            raise ValueError(f"the option for {name} is {name.lower()}s_per_run")
        if amount <= 0:
            raise ValueError(f"of {name} it must be more than 0")
    return resources


class Ray(Executor):
    """Tasks of a Ray cluster, a given one or one on this machine; Ray queues and places them.

    Args:
        address: of a given cluster: ``auto``, ``HOST:PORT`` from one of its nodes, or ``ray://HOST:PORT``; a
            cluster on this machine is started, and ended with the study, if not given.
        cpus_per_run: cores that each run reserves, which are its threads.
        gpus_per_run: GPUs that each run reserves; a part of one is shared with other runs.
        resources: custom resources of the cluster's nodes that each run reserves, by name.
        num_cpus: cores that the cluster on this machine shares out; all if not given.
        queued: runs that are handed to Ray at once, waiting ones included, which is what a cluster grows by.
        runtime_env: Ray's runtime environment for the workers of a given cluster.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        cpus_per_run: Annotated[int, Field(ge=1, le=MOST_THREADS)] = 1,
        gpus_per_run: Annotated[float, Field(ge=0), AfterValidator(ray_driver.whole_above_one)] = 0,
        resources: Annotated[dict[str, float], AfterValidator(_custom)] = {},  # noqa: B006 - pydantic copies
        num_cpus: Annotated[int, Field(ge=1)] | None = None,
        queued: Annotated[int, Field(ge=1)] = 1000,
        runtime_env: dict[str, Any] | None = None,
    ) -> None:
        self.address = None if address == "local" else address
        for name, given in (("num_cpus", num_cpus), ("runtime_env", runtime_env)):
            if given is not None and (self.address is None) == (name == "runtime_env"):
                which = "a given cluster" if name == "runtime_env" else "a cluster on this machine"
                raise InputError(f"executor.{name}: for {which}, and executor.address says otherwise")
        self.cpus, self.gpus, self.resources = cpus_per_run, gpus_per_run, dict(resources)
        self.num_cpus, self.slots = num_cpus or cores(), queued
        self.runtime_env = runtime_env or {}
        self._driver: _Driver | None = None
        self._under_way: dict[str, Path] = {}

    def warm(self, also: Callable[[], object] | None = None) -> None:
        """Begin to start or to reach the cluster. Raises InputError if Ray is not installed."""
        if self._driver is None:
            if importlib.util.find_spec("ray") is None:
                raise InputError("the ray executor needs Ray: pip install 'flatbench-lora[ray]'")
            self._driver = _Driver(self._settings())

    def _settings(self) -> ray_driver.Settings:
        variables = {**own_variables(), **self.runtime_env.get("env_vars", {})}
        local = self.address is None
        return ray_driver.Settings(
            address=self.address,
            folder=_folder(),
            cwd=os.getcwd(),
            num_cpus=self.num_cpus,
            cpus=self.cpus,
            gpus=self.gpus,
            jobs=max(1, self.num_cpus // self.cpus) if local else 0,
            lease=self.lease,
            resources=self.resources,
            runtime_env={**self.runtime_env, "env_vars": variables},
        )

    def submit(self, paths: Sequence[Path]) -> None:
        """Hand runs to the cluster. Raises InputError if it cannot be started or reached, or is too small."""
        self.warm()
        assert self._driver is not None
        self._driver.ready()
        named = {os.path.abspath(path): path for path in paths}
        self._under_way |= named
        self._driver.submit(list(named))

    def ended(self, timeout: float) -> list[Ended]:
        """Wait for the cluster."""
        assert self._driver is not None
        try:
            return [self._collect(*answer) for answer in self._driver.answers(timeout)]
        except EOFError:
            # what was under way is tried again, with another driver
            self._driver.kill()
            self._driver = None
            lost, self._under_way = list(self._under_way.values()), {}
            return [Ended(path, None, "the connection to Ray was lost") for path in lost]

    def _collect(self, kind: str, *told: Any) -> Ended:
        if kind == "raised":
            raise told[0]
        path, state, died = told
        return Ended(self._under_way.pop(path), state, died)

    def close(self) -> None:
        """End the tasks, and the cluster if it is ours. Runs under way are asked to save where they are."""
        driver, self._driver, self._under_way = self._driver, None, {}
        if driver is not None:
            driver.stop(self.grace)


class _Driver:
    """The process that uses Ray, from outside."""

    def __init__(self, settings: ray_driver.Settings) -> None:
        self.settings = settings
        self._connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=ray_driver.serve, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is seen here
        self._deadline = time.monotonic() + _START
        self._is_ready = False

    def ready(self) -> None:
        """Wait until it can take runs."""
        if self._is_ready:
            return
        cluster = (
            f"the Ray cluster at {self.settings.address}" if self.settings.address else "a local Ray cluster"
        )
        reason = f"no answer within {_START:.0f} s"
        try:
            if self._connection.poll(max(0.0, self._deadline - time.monotonic())):
                kind, told = self._connection.recv()
                if kind == "ready":
                    self._is_ready = True
                    for line in told:
                        _log.warning(line)
                    return
                reason = told
        except (EOFError, OSError):
            reason = self._last_line()
        verb = "reached" if self.settings.address else "started"
        raise InputError(f"{cluster} cannot be {verb}: {reason}")

    def _last_line(self) -> str:
        try:
            lines = (self.settings.folder / ray_driver.LOG).read_text(errors="replace").split("\n")
        except OSError:
            lines = []
        return next((line for line in reversed(lines) if line.strip()), "Ray ended without a word")

    def submit(self, paths: list[str]) -> None:
        try:
            self._connection.send(("submit", paths))
        except OSError:  # it is gone, which the next look for answers will tell
            return

    def answers(self, timeout: float) -> list[tuple[Any, ...]]:
        """What it has to say; waits for something. Raises EOFError if it is gone and has said all."""
        found: list[tuple[Any, ...]] = []
        try:
            while self._connection.poll(0 if found else timeout):
                found.append(self._connection.recv())
        except (EOFError, OSError):
            if not found:
                raise EOFError from None
        return found

    def stop(self, grace: float) -> None:
        try:
            self._connection.send(("stop", grace))
            self._process.join(grace + _END)
        except OSError:
            pass
        finally:  # if it takes too long, or if somebody is too impatient to wait for it
            self.kill()

    def kill(self) -> None:
        """End what is left of it: it is the first process of a session that all the others belong to."""
        self._process.kill()
        if self._process.pid is not None:
            ray_driver.end_session(self._process.pid)
        self._process.join()
        self._connection.close()
        shutil.rmtree(self.settings.folder, ignore_errors=True)


def _folder() -> Path:
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="flatbench-ray-", dir=place if len(place) <= _SHORT else "/tmp"))
