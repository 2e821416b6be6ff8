"""How many vectors a search may hold, and where: beside the graphs, on the host, or in a file."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from flatbench.curvature.eigenpairs.rows import Rows
from flatbench.curvature.eigenpairs.rows_elsewhere import FileStore, HostStore, RowsElsewhere, Stack, Store
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.memory import available, default_scratch, readable, sufficient
from flatbench.errors import InputError

log = logging.getLogger(__name__)

#: a basis longer than this is restarted even where there is room for more
LONGEST_BASIS = 300
#: a basis of so many vectors and some for each value is seldom restarted
_COMFORTABLE, _COMFORTABLE_EACH = 40, 4


def folder(scratch: str | Path) -> Path:
    """The folder of that name, ``~`` resolved. Raises InputError for an empty name."""
    if not str(scratch):
        raise InputError("scratch: an empty name; '.' is the folder you are in")
    return Path(scratch).expanduser()


def rows_for(operator: SymmetricOperator, k: int, block: int, scratch: Path | None) -> tuple[int, Stack]:
    """The longest basis that there is room for, and an empty stack for it.

    The stack is beside the graphs where these leave room for a basis that is seldom restarted; else in
    ``scratch``, or for an accelerator in the host's memory; else as long as the room beside the graphs.

    Args:
        k: values that are searched.
        block: vectors per step.
        scratch: a folder; that of `flatbench.curvature.operators.memory.limited` if None.

    Raises InputError where the fewest vectors that will do have no room, or the folder is none.
    """
    n, least = operator.dimension, k + 2 * block + 2
    longest, beside = min(LONGEST_BASIS, n), Rows(n, operator.dtype, operator.device)
    if operator.memory is None or n <= least:
        return longest, beside
    each = n * operator.dtype.itemsize
    others = (k + 3) * each  # the vectors that are returned, or on their way
    away = _elsewhere(operator, each, default_scratch() if scratch is None else scratch)
    fewest = least + block if away is None else block + 1
    operator.reserve(fewest * each + others)
    fits = (operator.memory - operator.reserved_memory() - others) // each - block
    if fits >= min(longest, _COMFORTABLE + _COMFORTABLE_EACH * k):
        away = None
    if away is not None:
        found, make = away
        if fits >= 1 and found - block >= least:
            longest = min(longest, found - block)
            log.info(
                "basis of at most %d vectors, %s, away from the graphs", longest, readable(longest * each)
            )
            return longest, RowsElsewhere(make(), n, operator.dtype, operator.device)
    if fits < least:
        needed = sufficient(operator.memory_beside(fewest * each + others))
        message = (
            f"memory: {readable(operator.memory)} do not hold {least} vectors of length {n} beside the graphs"
        )
        if away is None:
            raise InputError(f"{message}; about {needed} would, or a folder for them (scratch)")
        raise InputError(
            f"{message}, and elsewhere there is room for {away[0]} of {readable(each)}; {needed} would do, "
            f"with room elsewhere for {least + block}"
        )
    longest = min(longest, fits)
    log.info("basis of at most %d vectors, %s", longest, readable(longest * each))
    return longest, beside


def _elsewhere(
    operator: SymmetricOperator, each: int, scratch: Path | None
) -> tuple[int, Callable[[], Store]] | None:
    """How many vectors there is room for elsewhere, and what makes the place; None without another place."""
    if scratch is not None:
        if not scratch.is_dir():
            raise InputError(f"scratch: {scratch} is no folder; make it, or name another")
        free = shutil.disk_usage(scratch).free
        return free // each, partial(FileStore, scratch, operator.dimension, operator.dtype)
    if operator.device.type != "cpu":
        free = available(torch.device("cpu")) // 2
        return free // each, partial(HostStore, operator.dimension, operator.dtype)
    return None
