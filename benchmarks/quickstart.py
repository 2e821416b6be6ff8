"""What `make quickstart` takes after its installation, and whether it says the same on other processors.

    python benchmarks/quickstart.py --output local/quickstart
    python benchmarks/quickstart.py --output local/quickstart --capabilities native avx2 default

Told are minutes, and memory of all its processes together: the sum of their proportional set sizes (shared
pages count once), twice a second. The goal: at most 4 minutes and 4 GiB on two cores. With several
capabilities the quickstart is run anew with each of torch's sets of vector instructions
(``ATEN_CPU_CAPABILITY``), as on processors that have no others, the backbone's pretraining included, and the
sentences of the reports' answers are compared, their numbers left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
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


def timed(arguments: list[str], environment: dict[str, str]) -> tuple[float, int]:
    """Seconds and peak bytes of a command. Raises CalledProcessError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([*FLATBENCH, *arguments], env=os.environ | environment)
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


#: a number, alone or in an interval
NUMBER = re.compile(r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def sentences(report: Path) -> list[str]:
    """The answer of a report, every number replaced: what it claims, without its digits."""
    content = json.loads((report / "findings.json").read_text(encoding="utf-8"))
    return [NUMBER.sub("#", line) for line in (*content["answer"], *content["reservations"])]


def once(folder: Path, capability: str) -> tuple[dict[str, float], list[str]]:
    """What one run took, and what its report says. ``native`` is whatever the processor has."""
    environment = {"FLATBENCH_CACHE": str((folder / "cache").resolve())}
    environment |= {} if capability == "native" else {"ATEN_CPU_CAPABILITY": capability}
    results, reports = folder / "results", folder / "reports"
    run, run_memory = timed(["run", "quickstart", "--jobs", "2", "--output", str(results)], environment)
    arguments = ["report", "quickstart", "--results", str(results), "--output", str(reports)]
    report, report_memory = timed(arguments, environment)
    took = {
        "minutes": round((run + report) / 60, 2),
        "run_minutes": round(run / 60, 2),
        "report_seconds": round(report, 1),
        "peak_memory_gib": round(max(run_memory, report_memory) / 2**30, 2),
    }
    return took, sentences(reports / "quickstart")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="a new folder for results and reports")
    parser.add_argument("--capabilities", nargs="+", default=["native"], help="native, avx2, default, …")
    chosen = parser.parse_args()
    if chosen.output.exists():
        parser.error(f"{chosen.output} is there already: finished runs would not be timed")
    found = {name: once(chosen.output / name, name) for name in chosen.capabilities}
    told = {name: took for name, (took, _) in found.items()}
    said = [lines for _, lines in found.values()]
    first = told[chosen.capabilities[0]]
    for name, (_, lines) in found.items():
        print(f"## {name}", *lines, sep="\n")
    several = {"by_capability": told, "same_sentences": all(lines == said[0] for lines in said)}
    record.write("quickstart", {**first, **(several if len(found) > 1 else {})})


if __name__ == "__main__":
    main()
