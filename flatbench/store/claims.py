"""Exclusive claims on run directories, renewed while work goes on, and taken over when dead.

A claim is a file in the run directory, made so that exactly one process can make it: by hard link, which is
atomic on network file systems too, where locks may not be. Its name holds a generation. Whoever finds the
newest claim dead makes the next generation; a process that had only been held up (suspended, cut off from
the file system) sees the newer one at its next commit and lets go (`Claim.check`). A claim is dead when its
process is gone, which is seen on the machine that it ran on, or when it was not renewed within its lease,
which is seen from everywhere: both times are read from the file system's own clock, so that the machines'
clocks need not agree.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from flatbench.errors import FlatbenchError
from flatbench.store.files import TEMPORARY, open_regular, read_regular, storage_error

#: seconds without a sign of life after which a claim from another machine is taken over; longer than network
#: file systems keep attributes (a minute, as a rule)
LEASE = 120.0
#: a claim is renewed so often within its lease
_RENEWALS = 6
_PREFIX = "claim-"
_NAME = re.compile(r"claim-\d{6,18}\.json")
_CONTAINER_MEMORY = Path("/sys/fs/cgroup/memory.events")


class ClaimLostError(FlatbenchError):
    """Another process has taken this run over, because no sign of life came from here for a whole lease."""


@dataclass(frozen=True)
class Holder:
    """What a claim says of the process that made it.

    Attributes:
        place: machine and process namespace in which ``pid`` has a meaning.
        started: when the process was started, which tells it from a later one of the same number.
        since: when the claim was made, in seconds since 1970.
        killed_for_memory: processes that the machine had killed for want of memory by then, or None.
    """

    token: str
    place: str
    host: str
    pid: int
    started: float
    since: float
    lease: float
    killed_for_memory: int | None = None

    def is_whole(self) -> bool:
        """Whether its values are such that a claim can have, which a file need not hold."""
        texts = all(isinstance(value, str) for value in (self.token, self.place, self.host))
        times = all(isinstance(value, int | float) for value in (self.started, self.since, self.lease))
        killed = self.killed_for_memory is None or isinstance(self.killed_for_memory, int)
        return texts and times and killed and isinstance(self.pid, int) and 0 < self.pid < 2**31


class Claim:
    """A run directory held by this process until `release`.

    Attributes:
        after: the dead holder that this one took over from, or None.
    """

    def __init__(self, path: Path, holder: Holder, after: Holder | None) -> None:
        self.path, self.holder, self.after = path, holder, after
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def holds(self) -> bool:
        """Whether the run is still this process's."""
        found = _read(self.path)
        newest = _newest(self.path.parent)
        return found is not None and found.token == self.holder.token and newest == self.path

    def check(self) -> None:
        """Raise ClaimLostError if another process has taken the run over."""
        if not self.holds():
            raise ClaimLostError(
                f"{self.path.parent}: taken over by another process, because this one had not renewed its "
                f"claim for {self.holder.lease:.0f} s; what that one does counts"
            )

    def release(self) -> None:
        """Let go, if it is still held."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        found = _read(self.path)
        if found is not None and found.token == self.holder.token:
            try:
                self.path.unlink(missing_ok=True)
            except OSError:  # the folder has turned read-only, which the next file written says
                _let_go.add(self.holder.token)

    def _renew(self) -> None:
        while not self._stop.wait(self.holder.lease / _RENEWALS):
            with contextlib.suppress(OSError):  # a file system that is away for a moment; the lease is longer
                found = _read(self.path)
                if found is None or found.token != self.holder.token:
                    return
                os.utime(self.path)

    def _keep(self) -> None:
        self._thread.start()


#: claims that this process holds no more, though it could not remove them
_let_go: set[str] = set()


def take(directory: Path, lease: float = LEASE) -> Claim | None:
    """Claim a run directory, or None while another process holds it.

    Raises StorageError when the directory cannot be written.
    """
    newest = _newest(directory)
    after = None if newest is None else _read(newest)
    if newest is not None and not _is_dead(newest, after, lease):
        return None
    number = 1 if newest is None else _generation(newest) + 1
    holder = Holder(
        token=uuid.uuid4().hex,
        place=_place(),
        host=platform.node(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=time.time(),
        lease=lease,
        killed_for_memory=killed_for_memory(),
    )
    path = directory / f"{_PREFIX}{number:06}.json"
    try:
        made = _create_exclusively(path, json.dumps(holder.__dict__))
    except OSError as error:
        raise storage_error(path, error) from error
    if not made:
        return None
    claim = Claim(path, holder, after)
    if not claim.holds():
        claim.release()
        return None
    for older in _claims(directory)[:-1]:
        older.unlink(missing_ok=True)
    claim._keep()
    return claim


@contextlib.contextmanager
def claimed(directory: Path, lease: float = LEASE) -> Iterator[Claim | None]:
    """`take`, and let go at the end of the block."""
    claim = take(directory, lease)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def holder(directory: Path) -> Holder | None:
    """Who holds a run directory now; None if nobody does, or the claim is dead."""
    newest = _newest(directory)
    if newest is None:
        return None
    found = _read(newest)
    return None if _is_dead(newest, found, LEASE) else found


def sweep(directory: Path) -> None:
    """Remove what processes that are gone left of their claims.

    They leave them where they were killed, or where the folder could not be written any more.
    """
    for path in _claims(directory):
        if _is_dead(path, _read(path), LEASE):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def renewed(directory: Path) -> int | None:
    """When the newest claim was last renewed, in nanoseconds of the file system's clock; None without any."""
    newest = _newest(directory)
    try:
        return None if newest is None else newest.stat().st_mtime_ns
    except OSError:
        return None


def killed_for_memory() -> int | None:
    """How many processes of this container were killed for want of memory; None where that is not told."""
    try:
        lines = _CONTAINER_MEMORY.read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def _claims(directory: Path) -> list[Path]:
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return [directory / name for name in sorted(names) if _NAME.fullmatch(name)]


def _newest(directory: Path) -> Path | None:
    return next(reversed(_claims(directory)), None)


def _generation(path: Path) -> int:
    return int(path.stem.removeprefix(_PREFIX))


def _read(path: Path) -> Holder | None:
    try:
        found = Holder(**json.loads(read_regular(path).decode()))
        return found if found.is_whole() else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _is_dead(path: Path, holder: Holder | None, lease: float) -> bool:
    if holder is not None and holder.token in _let_go:
        return True
    if holder is not None and holder.place == _place() and not _runs(holder):
        return True
    try:
        # opening has a network file system look at the file anew; its attributes alone may be old
        with open_regular(path) as file:
            renewed = os.fstat(file.fileno()).st_mtime
        age = _clock(path.parent) - renewed
    except OSError:
        return False  # it is just being released, or not to be seen now; the next look will tell
    return age > (holder.lease if holder else lease)


def _runs(holder: Holder) -> bool:
    try:
        process = psutil.Process(holder.pid)
        return abs(process.create_time() - holder.started) < 1e-3 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


#: by device: when its file system was asked for the time, and by how much that was ahead of our clock
_offsets: dict[int, tuple[float, float]] = {}
#: seconds for which that is believed; looking at a claim should not write a file each time
_OFFSET_SECONDS = 30.0


def _clock(directory: Path) -> float:
    """The time by the clock of the file system that holds ``directory``."""
    device, now = directory.stat().st_dev, time.monotonic()
    asked, offset = _offsets.get(device, (now - _OFFSET_SECONDS, 0.0))
    if now - asked >= _OFFSET_SECONDS:
        offset = _server_time(directory) - time.monotonic()
        _offsets[device] = now, offset
    return time.monotonic() + offset


def _server_time(directory: Path) -> float:
    probe = directory / f"{TEMPORARY}clock-{uuid.uuid4().hex[:8]}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return time.time()  # where it can only be looked at
        raise
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _place() -> str:
    """Where a process number means something: this boot of this machine, this namespace of processes."""
    parts = []
    sources: tuple[Callable[[], str], ...] = (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    )
    for source in sources:
        try:
            parts.append(source())
        except OSError:
            parts.append(platform.node())
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]


def _create_exclusively(path: Path, content: str) -> bool:
    """Make a whole file unless there is one of this name; whether it was made."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(content, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            # a network file system may have made the link and lost the answer
            return temporary.stat().st_nlink == 2
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _make_without_links(path, content)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _make_without_links(path: Path, content: str) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True
