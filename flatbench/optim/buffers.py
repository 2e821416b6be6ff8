"""The public place of `flatbench.optim.base.buffers`, for plug-ins."""

from __future__ import annotations

from flatbench.optim.base.buffers import (
    Buffers,
    Move,
    average_over_processes,
    norm,
    scaled,
    total_norm,
    usable,
)

__all__ = ["Buffers", "Move", "average_over_processes", "norm", "scaled", "total_norm", "usable"]
