"""Has runs wait at events of theirs, so that a test may kill or stop them there, on a machine however busy.

Python imports this by itself where `tests.holds.Hold.environment` puts its folder on PYTHONPATH: in whatever
process comes of a command, and it does nothing where no folder of holds is named. A run waits

- after it has recorded the event E (``epoch``: its state is saved) while the file ``E`` is in that folder;
- before it moves a file to its place while ``write`` is there, whose text is a pattern for the file's name.

While it waits, ``held-PID-E`` says so, which names the run's directory. Being asked to stop ends the waiting,
which changes nothing about what the run finds.
"""

from __future__ import annotations

import fnmatch
import os
import time
from pathlib import Path
from typing import Any

VARIABLE = "FLATBENCH_TEST_HOLDS"
#: seconds after which a run that nobody lets go, because its test has died, ends itself
_FORGOTTEN = 900.0


def install(folder: Path) -> None:
    """Have runs of this process heed the holds of a folder."""
    from flatbench.machine import stopping
    from flatbench.store import events

    record, replace = events.record, os.replace

    def wait(run: Path, what: str) -> None:
        mark, hold = folder / f"held-{os.getpid()}-{what}", folder / what
        deadline = time.monotonic() + _FORGOTTEN
        try:
            while hold.exists() and stopping.requested() is None:
                if not mark.exists():
                    fresh = mark.with_name(f"new-{mark.name}")
                    fresh.write_text(str(run))
                    replace(fresh, mark)
                if time.monotonic() > deadline:
                    os._exit(3)
                time.sleep(0.02)
        finally:
            mark.unlink(missing_ok=True)

    def recorded(directory: Path, event: str, **fields: Any) -> None:
        record(directory, event, **fields)
        wait(Path(directory), event)

    def replaced(source: Any, target: Any, **more: Any) -> None:
        pattern = folder / "write"
        if pattern.exists() and fnmatch.fnmatch(Path(target).name, pattern.read_text()):
            wait(Path(target).parent, "write")
        replace(source, target, **more)

    events.record, os.replace = recorded, replaced  # type: ignore[assignment]


if VARIABLE in os.environ:
    install(Path(os.environ[VARIABLE]))
