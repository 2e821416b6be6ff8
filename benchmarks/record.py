"""Writes what a benchmark found, with the machine, the versions and the command, beside what it prints."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flatbench.machine import environment

RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: dict[str, Callable[[], float]], blocks: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each variant, in turns, so that a slow moment of the machine hits all alike."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for block in range(-warm_up, blocks):
        for name in names if block % 2 else reversed(names):
            taken = variants[name]()
            if block >= 0:
                seconds[name].append(taken)
    return seconds


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Median of the block-wise ratios, with their quartiles."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "quartile_1": low, "quartile_3": high}


def write(name: str, found: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write ``benchmarks/results/NAME.json``, or the same in another folder, and print it."""
    content = {
        **found,
        "machine": environment.describe(),
        "command": shlex.join(["python", *sys.argv]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(content, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)
    return path
