"""Start processes as forks of a server that has imported torch, transformers and peft once.

Importing them takes several seconds of a core, which each process would pay for itself. The server imports
and does nothing else, so a fork of it is like a fresh process. It ends with the last process that uses it.
Where the machine has an accelerator, whose driver does not outlive a fork once a library has asked for its
devices, and on systems other than Linux, processes start anew ("spawn").
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Literal

#: imported by the server: by name, since it stands above this room
PRELOAD = ["flatbench.executors.preloaded"]
#: what lies here where there is an accelerator
_ACCELERATORS = ("/proc/driver/nvidia/gpus", "/dev/nvidiactl", "/dev/kfd", "/dev/dri", "/dev/accel")


def start_method() -> Literal["forkserver", "spawn"]:
    """How processes are started on this machine."""
    if sys.platform != "linux" or any(Path(place).exists() for place in _ACCELERATORS):
        return "spawn"
    return "forkserver"


def context() -> BaseContext:
    """multiprocessing's context for processes that need torch."""
    found = multiprocessing.get_context(start_method())
    found.set_forkserver_preload(PRELOAD)
    return found


def environment() -> dict[str, str]:
    """What a new process is to take over with `begin`: the server may have been started under another one."""
    return dict(os.environ)


def begin(environment: Mapping[str, str]) -> None:
    """Take over the environment of the process that asked for this one, and end when it has gone."""
    os.environ.clear()
    os.environ.update(environment)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
