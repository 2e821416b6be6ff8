"""Memory that graphs take, and memory that is available."""

from __future__ import annotations

import contextlib
import math
import os
import re
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
_scratch: ContextVar[Path | None] = ContextVar("scratch folder", default=None)
_counting: ContextVar[LiveBytes | None] = ContextVar("counting", default=None)


@contextlib.contextmanager
def limited(budget: int | None, scratch: Path | None = None) -> Iterator[None]:
    """Inside, operators and searches that are given no budget and no folder of their own take these.

    Args:
        budget: in bytes; None changes nothing.
        scratch: folder for vectors that the memory does not hold; None changes nothing.
    """
    limit = _limit.set(_limit.get() if budget is None else budget)
    folder = _scratch.set(_scratch.get() if scratch is None else scratch)
    try:
        yield
    finally:
        _limit.reset(limit)
        _scratch.reset(folder)


def default_scratch() -> Path | None:
    """The folder of `limited`."""
    return _scratch.get()


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


class TooLarge(Exception):  # noqa: N818 - an answer, not an error
    """What was to be measured takes more than there is room for."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations inside make and that are still alive, each storage once.

    What is there before is not counted, nor are views of it. Raises TooLarge inside as soon as there are more
    than ``limit``.

    Attributes:
        now: bytes that are alive.
        peak: the most that were alive at once since the beginning, or since `restart`.
        highest: the most since the beginning.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self.highest, self.limit = 0, 0, 0, limit
        self._alive: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> int:
        """Begin a new peak; what is alive now."""
        self.peak = self.now
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation and note what it makes."""
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a tensor of its own kind says what is done, which comes here again
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            self._note(given, made=False)
        found = func(*args, **kwargs)
        for made in tree_leaves(found):
            self._note(made, made=True)
        return found

    def _note(self, value: Any, made: bool) -> None:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak, self.highest = max(self.peak, self.now), max(self.highest, self.now)
        if self.now > self.limit:
            raise TooLarge(f"more than {readable(self.limit)} are alive")


@contextlib.contextmanager
def counted(limit: float = math.inf, device: torch.device | str = "cpu") -> Iterator[LiveBytes]:
    """Inside, bytes are counted; TooLarge, where it comes in a backward pass, leaves nothing behind.

    torch's engine keeps what was still to be done of a pass that is broken off until older nodes are run.
    """
    leaf = torch.zeros((), device=device, requires_grad=True)
    with torch.enable_grad():
        older = leaf * 1
    with LiveBytes(limit) as live:
        token = _counting.set(live)
        try:
            yield live
        except TooLarge:
            torch.autograd.grad(older, leaf)
            raise
        finally:
            _counting.reset(token)


def count(tensor: Tensor) -> None:
    """Count a tensor that no operation has made, such as one that was read, where bytes are counted."""
    live = _counting.get()
    if live is not None:
        live._note(tensor, made=True)


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
