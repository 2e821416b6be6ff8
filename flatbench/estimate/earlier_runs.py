"""How long a study's finished runs took on the machines that made them; imports no torch."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from statistics import median
from typing import Any

from flatbench.store import RunDirectory, events

#: runs of a method in a condition and stage that are asked: their median needs no more
_ASKED = 50


def seconds(
    places: Iterable[tuple[Mapping[str, Any], RunDirectory]],
) -> dict[tuple[str, str, str], float]:
    """(condition, method, stage) -> median seconds of runs that are done and were not interrupted.

    Args:
        places: places in a study and the runs that fill them, as `flatbench.store.StudyFolder.places` gives
            them.
    """
    found: dict[tuple[str, str, str], list[float]] = {}
    asked: Counter[tuple[str, str, str]] = Counter()
    for place, directory in places:
        key = (str(place["condition"]), str(place["method"]), str(place["stage"]))
        if asked[key] >= _ASKED:
            continue
        log = events.read(directory.path)
        begun = [str(entry.get("time")) for entry in log if entry["event"] == "begun"]
        done = [str(entry.get("time")) for entry in log if entry["event"] == "done"]
        if len(begun) != 1 or not done:  # one that was interrupted does not tell
            continue
        asked[key] += 1
        with contextlib.suppress(ValueError, TypeError):  # times that no process of ours wrote
            took = datetime.fromisoformat(done[-1]) - datetime.fromisoformat(begun[0])
            found.setdefault(key, []).append(took.total_seconds())
    return {key: median(times) for key, times in found.items()}
