"""What `make quickstart` takes after its installation: minutes, and memory of all its processes together.

    python benchmarks/quickstart.py --output local/quickstart

Memory is the sum of the processes' proportional set sizes (shared pages count once), twice a second.
The goal: at most 6 minutes and 4 GiB on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import record

FLATBENCH = [sys.executable, "-c", "from flatbench.cli import main; main()"]


def memory(process: psutil.Process) -> int:
    """Bytes of a process and its descendants."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # gone in the meantime
            total += one.memory_full_info().pss
    return total


def timed(arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([*FLATBENCH, *arguments])
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            with contextlib.suppress(psutil.Error):
                peak[0] = max(peak[0], memory(psutil.Process(process.pid)))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    code = process.wait()
    over.set()
    watcher.join()
    if code:
        raise subprocess.CalledProcessError(code, arguments)
    return time.perf_counter() - start, peak[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder for results and report")
    folder = parser.parse_args().output
    if folder.exists():
        parser.error(f"{folder} is there already: finished runs would not be timed")
    results = folder / "results"
    run, run_memory = timed(["run", "quickstart", "--jobs", "2", "--output", str(results)])
    report, report_memory = timed(
        ["report", "quickstart", "--results", str(results), "--output", str(folder / "reports")]
    )
    record.write(
        "quickstart",
        {
            "minutes": round((run + report) / 60, 2),
            "run_minutes": round(run / 60, 2),
            "report_seconds": round(report, 1),
            "peak_memory_gib": round(max(run_memory, report_memory) / 2**30, 2),
        },
    )


if __name__ == "__main__":
    main()
