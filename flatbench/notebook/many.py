"""Measures of many saved checkpoints on one set of data: a row each, and the difference of two."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pandas as pd

from flatbench.config.yaml import parse
from flatbench.curvature.estimates.probes import student
from flatbench.curvature.operators.batches import chosen
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import Measure
from flatbench.notebook.checkpoint import Checkpoint
from flatbench.notebook.chosen import answers, resolved
from flatbench.notebook.data import Batch
from flatbench.notebook.load import load_checkpoint
from flatbench.subject.objective import rows

log = logging.getLogger(__name__)

#: what is measured where nothing is named
USUAL = ("critical_sharpness", "sam_sharpness")
#: groups of examples over which a difference is told, and how many examples each has at least
GROUPS, LEAST = 8, 4
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
#: what makes a folder a checkpoint
_MARKS = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class Place:
    """A checkpoint to measure.

    Attributes:
        path: its folder.
        name: what its row is called.
        step: of its training; None where it is not known, as of what was saved at the end.
    """

    path: Path
    name: str
    step: int | None = None


@dataclass
class Measured:
    """What was found.

    Attributes:
        table: a row a checkpoint: ``checkpoint``, ``step``, ``base``, and ``<label>.<value>``.
        differences: of two checkpoints, a row a measure; empty for another number.
        notes: what a reader has to know beside.
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    notes: list[str] = field(default_factory=list)


def places(paths: Sequence[Path]) -> list[Place]:
    """The checkpoints that folders stand for: each itself, or a training's ``checkpoint-*`` and its end.

    Raises InputError for a folder that holds none.
    """
    found: list[Place] = []
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path}: no such folder")
        steps = sorted(
            (int(match[1]), inside)
            for inside in path.iterdir()
            if inside.is_dir() and (match := _CHECKPOINT.fullmatch(inside.name))
        )
        own = any((path / mark).is_file() for mark in _MARKS) or (
            not steps and any(path.glob("*/adapter_config.json"))
        )
        name = path.resolve().name
        if not steps and not own:
            raise InputError(
                f"{path}: no checkpoint here: neither adapter_config.json (a peft adapter) nor config.json "
                "(a transformers model) nor checkpoint-* (a Trainer's output) nor run.json (a flatbench run)"
            )
        prefix = f"{name}/" if len(paths) > 1 else ""
        found += [Place(inside, f"{prefix}{inside.name}", step) for step, inside in steps]
        if own:
            found.append(Place(path, f"{prefix}end" if steps else name))
    return found


def measure_folders(
    paths: Sequence[Path],
    data: Mapping[str, Any],
    wanted: Sequence[str | Mapping[str, Any]] = USUAL,
    **options: Any,
) -> Measured:
    """Take measures of every checkpoint in some folders.

    Args:
        paths: folders, see `places`.
        data: split -> examples; the first is measured on, others are for ``relative_critical_sharpness``.
        wanted: measures by name, as YAML, or as mappings.
        options: of `flatbench.load_checkpoint`: ``base``, ``task``, ``text_columns``, …

    A measure without a meaning for a checkpoint, and a checkpoint of a training that cannot be opened, leave
    their reason in the table. Raises InputError where no checkpoint can be opened, or data do not fit.
    """
    entries = [parse(w) if isinstance(w, str) and not w.isidentifier() else w for w in wanted]
    found, notes, opened = [], [], []
    all_places = places(paths)
    for place in all_places:
        try:
            checkpoint = load_checkpoint(place.path, data, **options)
        except InputError as error:
            if len(all_places) == 1 or place.step is None:
                raise
            notes.append(str(error))
            found.append(_row(place, {"failed": str(error)}))
            continue
        taken = resolved(entries, checkpoint.model, "--measure")
        row = _row(place, {"base": checkpoint.metadata.get("base")})
        whole: dict[str, Mapping[str, float]] = {}
        for label, (measure, _) in taken.items():
            values = _values(checkpoint, measure, f"{place.name} {label}")
            row |= {f"{label}.{key}": v for key, v in values.items() if not isinstance(v, list | dict)}
            if "skipped" in values or "failed" in values:
                notes.append(f"{place.name} {label}: {values.get('skipped') or values.get('failed')}")
            else:
                whole[label] = answers(values)
        found.append(row)
        if len(all_places) == 2:
            opened.append((place, checkpoint, taken, whole))
    if not any("failed" not in row for row in found):
        raise InputError(notes[0])
    bases = sorted({str(row["base"]) for row in found if row.get("base")})
    if len(bases) > 1:
        notes.append(f"these are adapters of different base models: {', '.join(bases)}")
    compared = _differences(opened, notes) if len(opened) == 2 else pd.DataFrame()
    table = pd.DataFrame(found)
    for column in table:
        if column == "step" or table[column].isna().all():  # numbers, of which some or all are missing
            table[column] = pd.to_numeric(table[column])
    return Measured(table, compared, notes)


def _row(place: Place, more: Mapping[str, Any]) -> dict[str, Any]:
    return {"checkpoint": place.name, "step": place.step, **more}


def _values(checkpoint: Checkpoint, measure: Measure, what: str) -> dict[str, Any]:
    log.info("%s", what)
    try:
        return measure(checkpoint.subject())
    except NotApplicableError as reason:
        return {"skipped": str(reason)}
    except InputError:
        raise
    except FlatbenchError as error:
        return {"failed": str(error)}


# -- two checkpoints ----------------------------------------------------------------------------------------


def _differences(opened: Sequence[Any], notes: list[str]) -> pd.DataFrame:
    """The first checkpoint less the second, measure by measure; intervals by groups of the same examples.

    The difference is that of the values over all examples: an eigenvalue of a few examples is larger than
    that of all, by more in one checkpoint than in another.
    """
    (first, a, measures, all_of_a), (second, b, others, all_of_b) = opened
    groups = [grouped(c.subject().batches) for c in (a, b)]
    counts = [[sum(map(rows, group)) for group in part] for part in groups]
    if counts[0] != counts[1]:
        notes.append("the examples of the two are batched differently: no differences")
        return pd.DataFrame()
    if len(groups[0]) < 2:
        notes.append(f"fewer than {2 * LEAST} examples: no intervals of differences")
        return pd.DataFrame()
    found = []
    for label, (measure, _) in measures.items():
        if label not in all_of_a or label not in all_of_b:
            continue
        pairs = []
        for left, right in zip(*groups, strict=True):
            try:
                pairs.append(
                    (
                        answers(measure(replace(a.subject(), batches=left))),
                        answers(others[label][0](replace(b.subject(), batches=right))),
                    )
                )
            except NotApplicableError:
                break
        whole = {n: all_of_a[label][n] - all_of_b[label][n] for n in all_of_a[label] if n in all_of_b[label]}
        made = _rows_of_differences(label, whole, pairs, first.name, second.name)
        found += made
        if not made:
            notes.append(f"{label}: no value in some groups of the examples, and so no difference")
    return pd.DataFrame(found)


def _rows_of_differences(
    label: str,
    whole: Mapping[str, float],
    pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]],
    first: str,
    second: str,
) -> list[dict[str, Any]]:
    found = []
    for name, difference in whole.items() if pairs else ():
        if not all(name in left and name in right for left, right in pairs):
            continue
        gaps = [left[name] - right[name] for left, right in pairs]
        half = student(len(gaps)) * stdev(gaps) / math.sqrt(len(gaps))
        found.append(
            {
                "measure": f"{label}.{name}",
                "difference": difference,
                "low": difference - half,
                "high": difference + half,
                "groups": len(gaps),
                "tells": "no difference"
                if abs(difference) <= half
                else f"{first if difference > 0 else second} is larger",
            }
        )
    return found


def grouped(batches: Sequence[Batch]) -> list[list[Batch]]:
    """The examples in their order in at most `GROUPS` groups of about one size, of at least `LEAST` each."""
    total = sum(map(rows, batches))
    count = max(min(GROUPS, total // LEAST), 1)
    ends = [round(total * (i + 1) / count) for i in range(count)]
    found: list[list[Batch]] = [[] for _ in range(count)]
    offset = group = 0
    for batch in batches:
        size, start = rows(batch), 0
        while start < size:
            end = min(size, ends[group] - offset + start)
            found[group].append(chosen(batch, slice(start, end)))
            offset, start = offset + end - start, end
            if offset == ends[group] and group < count - 1:
                group += 1
    return found
