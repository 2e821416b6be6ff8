"""Times commands that take turns, a few seconds each, so that a slow moment of the machine hits all alike.

A shared machine's speed drifts by several percent within minutes: of two long commands, one after the other,
that is more than what is to be told apart. Here every command has a process group of its own, of which one
goes on while the others are stopped (SIGSTOP, SIGCONT); a command's time is the time in which it went on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Turns:
    """A command under way, or what came of it.

    Attributes:
        seconds: from its start to its exit, without the time in which it was stopped.
        cpu_seconds: of it and of the processes that it started, once it has ended.
    """

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    ended: bool = False
    _process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        """The file that holds what it wrote, to both of its streams."""
        return self.folder / "output.txt"

    def turn(self, length: float | None) -> None:
        """Let it go on for so many seconds, or until it ends.

        Raises subprocess.CalledProcessError if it ends with another exit code than 0.
        """
        start = time.perf_counter()
        if self._process is None:
            with self.output.open("wb") as output:
                self._process = subprocess.Popen(
                    self.command,
                    cwd=self.folder,
                    env={**os.environ, **self.environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        else:
            os.killpg(self._process.pid, signal.SIGCONT)
        # its exit is seen at once, and nothing is looked at in between: both cores are its own
        watched = os.pidfd_open(self._process.pid)
        try:
            ended, _, _ = select.select([watched], [], [], length)
        finally:
            os.close(watched)
        if ended:
            self._over()
        else:
            os.killpg(self._process.pid, signal.SIGSTOP)
        self.seconds += time.perf_counter() - start

    def _over(self) -> None:
        _, status, used = os.wait4(self._process.pid, 0)
        self.ended, self.cpu_seconds = True, used.ru_utime + used.ru_stime
        code = self._process.returncode = os.waitstatus_to_exitcode(status)
        if code:
            raise subprocess.CalledProcessError(code, self.command, self.output.read_bytes())

    def kill(self) -> None:
        """End it, if it has not ended, with all that it started."""
        if self._process is not None and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def alternate(commands: Sequence[Turns], length: float) -> None:
    """Run commands to their ends, in turns of so many seconds; the first one begins."""
    try:
        while left := [command for command in commands if not command.ended]:
            for command in left:
                command.turn(length)
    finally:
        for command in commands:
            command.kill()
