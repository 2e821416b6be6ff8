"""Memory that graphs take, and memory that is available."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from flatbench.curvature.operators.widened import Widened
from flatbench.errors import InputError


def available(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, by what the system and its container say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError):  # a container's limit, where there is one
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = min(free, max(limit, 0))
    return free


_limit: ContextVar[int | None] = ContextVar("memory limit", default=None)


@contextlib.contextmanager
def limited(budget: int | None) -> Iterator[None]:
    """Inside, operators that are given no budget of their own take this one; None changes nothing."""
    token = _limit.set(_limit.get() if budget is None else budget)
    try:
        yield
    finally:
        _limit.reset(token)


def default_budget(device: torch.device) -> int:
    """The budget of `limited`, or half of what is available."""
    limit = _limit.get()
    return available(device) // 2 if limit is None else limit


def parsed(text: str) -> int:
    """Bytes from ``2GB``, ``500MB`` or a number. Raises InputError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kMGT]?)B?\s*", text)
    try:
        count = float(found[1]) * 1000 ** " kMGT".index(found[2] or " ") if found else 0
    except ValueError:
        count = 0
    if count < 1:
        raise InputError(f"memory: '{text}' is no amount; write 2GB, 500MB or a number of bytes")
    return int(count)


def _read(tensor: Tensor) -> Tensor:
    """What is in memory: of a tensor that is widened as it is used, what that reads."""
    return tensor.stored if isinstance(tensor, Widened) else tensor


class TooLarge(Exception):  # noqa: N818 - an answer, not an error
    """A graph that was to be measured takes more than there is room for."""


class SavedBytes:
    """Counts the bytes that autograd saves for backward passes, each storage once.

    Raises TooLarge in the pass that is counted as soon as there are more than ``limit``.
    """

    def __init__(self, excluded: Iterable[Tensor], limit: float = math.inf) -> None:
        self._storages = {_read(tensor).untyped_storage().data_ptr() for tensor in excluded}
        self.total, self.limit = 0, limit

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, what graphs save is counted; the graphs work as ever."""

        def pack(tensor: Tensor) -> Tensor:
            # a saved output that knows its own node would keep the node, which keeps it, for good
            return self._pack(tensor).detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def add(self, tensor: Tensor) -> None:
        """Count a tensor that is held beside what autograd saves."""
        self._pack(tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _read(tensor).untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages.add(storage.data_ptr())
            self.total += storage.nbytes()
            if self.total > self.limit:
                raise TooLarge(f"a graph takes more than {readable(self.limit)}")
        return tensor


def readable(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def sufficient(count: float) -> str:
    """Bytes for people, rounded up to three digits: a budget of what is said holds the count."""
    if not math.isfinite(count) or count < 1000:
        return readable(count)
    power = min(int(math.log10(count)) // 3, 4)
    scaled = count / 1000**power
    digits = max(3 - len(str(int(scaled))), 0)
    return f"{math.ceil(scaled * 10**digits) / 10**digits:.{digits}f} {' kMGT'[power]}B"
