"""Commands in processes of their own that have torch imported already: forks of one that has.

A process that imports torch, transformers and peft takes 6 s of a core for that. `run` asks a server, which
is started once for a session of tests, for a fork of itself in which `flatbench` runs as on the command line:
same arguments, working directory, environment, output, signals and exit code. The server has imported modules
and done nothing else, so a fork of it is like a fresh process. What such a command starts is started anew.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: where the server listens, for processes that tests start
VARIABLE = "FLATBENCH_TEST_WARM"
#: seconds for the server to have imported what it imports
_START = 600.0


class Command:
    """A command that runs, with what tests use of `subprocess.Popen`."""

    def __init__(self, request: Mapping[str, Any], output: Sequence[int]) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(os.environ[VARIABLE])
        socket.send_fds(self._connection, [b"f"], list(output))
        self._connection.sendall(json.dumps(dict(request)).encode() + b"\n")
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None
        self._over = threading.Event()
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        self.returncode = int(self._answers.readline() or -signal.SIGKILL)
        self._answers.close()
        self._connection.close()
        self._over.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._over.wait(timeout):
            raise subprocess.TimeoutExpired("a warm command", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    *arguments: str,
    cwd: Path,
    module: str = "flatbench",
    output: Path | None = None,
    errors: Path | None = None,
    **variables: str,
) -> Command:
    """Start a command, in a process group of its own.

    Args:
        module: what is run, as by ``python -m``.
        output: file to which what it says is added.
        errors: file for its standard error, if it is another.
    """
    server()
    output = output or Path(os.devnull)
    with output.open("ab") as file, (errors or output).open("ab") as beside:
        request = {
            "module": module,
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": {**os.environ, **variables},
        }
        return Command(request, [file.fileno(), beside.fileno()])


def completed(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """What a command said and how it ended, as `subprocess.run` has it; it plans in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        variables = {"COLUMNS": "200", "FLATBENCH_TEST_PLANS_HERE": "1", **variables}
        code = run(*arguments, cwd=cwd, output=output, errors=errors, **variables).wait(_START)
        return subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())


def server() -> None:
    """Have the server of this session started."""
    if VARIABLE in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = str(Path(folder.name) / "socket")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests import warm; warm.serve({address!r})"
    # it ends with its standard input, and so with this process, however that ends
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdin is not None
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START)
    assert ready, "the server of warm commands did not start"
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    os.environ[VARIABLE] = address

    def end() -> None:
        os.environ.pop(VARIABLE, None)
        process.stdin.close()  # type: ignore[union-attr]
        process.wait()
        folder.cleanup()

    atexit.register(end)


def serve(address: str) -> None:
    """Fork as often as is asked for; in the forks, do what was asked."""
    import submitit.core._submit
    import submitit.core.submission  # noqa: F401

    import flatbench.cli
    import flatbench.runs.finish
    import flatbench.tasks.images.digits  # noqa: F401
    from flatbench import measures, optim
    from flatbench.orchestration import run_study, stages  # noqa: F401

    for registry in (measures.REGISTRY, optim.REGISTRY):
        for name in registry.names():
            with contextlib.suppress(ImportError):
                registry.load(name)
    gc.collect()
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    request = _serve(listening)
    if request is None:
        os._exit(0)
    _become(request)


def _serve(listening: socket.socket) -> dict[str, Any] | None:
    """Returns None when its standard input ends; in a fork, what it was asked for."""
    ended: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([0, listening, *ended], [], [])
        for handle in ready:
            if handle == 0:
                return None
            if handle is listening:
                connection, _ = listening.accept()
                _, streams, _, _ = socket.recv_fds(connection, 1, 2)
                with connection.makefile("r") as lines:
                    request = json.loads(lines.readline())
                pid = os.fork()
                if pid == 0:
                    for stream, place in zip(streams, (1, 2), strict=True):
                        os.dup2(stream, place)
                    nothing = os.open(os.devnull, os.O_RDONLY)
                    os.dup2(nothing, 0)
                    for left in (nothing, *streams, *ended):
                        os.close(left)
                    for other in (listening, connection, *(other for _, other in ended.values())):
                        other.close()
                    os.setpgid(0, 0)
                    return dict(request)
                for stream in streams:
                    os.close(stream)
                connection.sendall(f"{pid}\n".encode())
                ended[os.pidfd_open(pid)] = pid, connection
            else:
                pid, connection = ended.pop(handle)
                os.close(handle)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                connection.close()


def _become(request: Mapping[str, Any]) -> None:
    """Be the command that was asked for; its exit code is this process's, as Python ends."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # which the environment may name
    if "FLATBENCH_TEST_HOLDS" in os.environ:
        runpy.run_path(str(ROOT / "tests" / "holding" / "sitecustomize.py"))
    if "FLATBENCH_TEST_PLANS_HERE" in os.environ:
        _plan_here()
    sys.argv = ["flatbench", *request["arguments"]]
    if request["module"] == "flatbench":
        from flatbench.cli import main

        main()
    else:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def _plan_here() -> None:
    """Have a command plan in this process, which has imported what that takes, and not in another one."""
    from flatbench.executors.base import Executor

    Executor.call = lambda self, function, *arguments, **named: function(*arguments, **named)  # type: ignore
