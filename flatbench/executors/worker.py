"""What a process that works for another one does first."""

from __future__ import annotations

import contextlib
import os

from flatbench import stopping

#: what a worker enters once, and never leaves
_for_life = contextlib.ExitStack()


def start_worker(parent: int, devices: str | None) -> None:
    """Prepare a worker: its GPUs, what signals mean, and to end when its parent is gone, however it went."""
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    _for_life.enter_context(stopping.heeded(patient=True))
    stopping.end_with(parent)
