"""Peak memory of a stretch of work on one device, and where the number comes from."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Highest memory use since this object was made, in bytes.

    On a CUDA device it is the allocator's peak. On the CPU it is the process's peak resident set
    (``VmHWM``, reset at the start where the kernel allows it), so it holds the interpreter and libraries
    too; elsewhere the resident set at the moments when `bytes` was called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._floor = 0
        if device.type == "cuda":
            self.source = "cuda allocator"
            torch.cuda.reset_peak_memory_stats(device)
        elif _reset_resident_peak():
            self.source = "peak resident set"
        else:
            self.source = "sampled resident set"

    def at_least(self, floor: int) -> None:
        """Take into account a peak from before an interruption."""
        self._floor = max(self._floor, floor)

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            now = torch.cuda.max_memory_allocated(self.device)
        elif self.source == "peak resident set":
            now = _resident_peak()
        else:
            now = int(psutil.Process().memory_info().rss)
        self._floor = max(self._floor, now)
        return self._floor


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident_peak() > 0
    except OSError:
        return False


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
