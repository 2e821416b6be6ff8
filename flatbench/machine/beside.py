"""Do some work in a fork of this process while it goes on with something else."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def beside(work: Callable[[], Result]) -> Callable[[], Result]:
    """Begin some work on another core; the function that is returned waits for its result.

    It raises what the work raised. Where a fork is not safe (other threads, torch with its own), of no use
    (one core) or fails, the work is done here, when its result is asked for.

    Args:
        work: its result must be picklable; what it changes in this process's memory is lost.
    """
    if not _forkable():
        return work
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(work, theirs), daemon=True)
    process.start()
    theirs.close()

    def result() -> Result:
        try:
            succeeded, found = ours.recv()
        except (EOFError, OSError):  # it was killed, or what it found cannot be sent
            return work()
        finally:
            ours.close()
            process.join()
        if not succeeded:
            raise found
        answer: Result = found
        return answer

    return result


def _forkable() -> bool:
    return (
        sys.platform == "linux"
        and len(os.sched_getaffinity(0)) > 1
        and threading.active_count() == 1
        and "torch" not in sys.modules
        and not multiprocessing.current_process().daemon
    )


def _send(work: Callable[[], Any], pipe: Any) -> None:
    try:
        found = (True, work())
    except Exception as error:
        found = (False, error)
    pipe.send(found)
