"""Sizes of a study's downloads, and of what it writes down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import try_to_load_from_cache

from flatbench import tasks
from flatbench.config import sources
from flatbench.errors import InputError
from flatbench.estimate import sketches
from flatbench.estimate.gpu_hours import MethodCost
from flatbench.models import pretrained
from flatbench.study import Study
from flatbench.tasks.common.hub import Source

#: bytes that a run writes beside its weights
_RUN = 200_000
#: copies of a run's weights with their two moments that are kept while it trains
_STATES = 2 * 3


@dataclass(frozen=True)
class Needs:
    """What a study takes and leaves.

    Attributes:
        downloads: name -> megabytes, None where the table of sources does not know it.
        results: bytes of all runs' directories.
    """

    downloads: Mapping[str, float | None]
    results: int | None


def needs(study: Study, costs: Sequence[MethodCost]) -> Needs:
    """A study's needs. What is in the hub's cache already is no download."""
    found: dict[str, float | None] = {}
    for condition in study.conditions:
        try:
            task: Any = tasks.load(condition.task, condition.model)
            source = None if sketches.unset(task) else task.source()
        except InputError:
            continue
        if source is not None and source.wanted is not None:
            found.setdefault(_name(source), source.known.megabytes if source.known else None)
        model = getattr(task, "model", None)
        if isinstance(model, pretrained.PretrainedModel) and not _is_here(model):
            known = sources.model(model.name_or_path)
            found.setdefault(model.name_or_path, known.megabytes if known else None)
    if any(cost.trained is None for cost in costs):
        return Needs(found, None)
    runs = sum(c.tuning_runs + c.final_runs for c in costs)
    written = sum((c.tuning_runs + c.final_runs) * 4 * (c.trained or 0) for c in costs)
    states = max((_STATES * 4 * (c.trained or 0) for c in costs), default=0)
    return Needs(found, written + states + runs * _RUN)


def _name(source: Source) -> str:
    assert source.wanted is not None
    configuration = source.wanted.configuration
    return source.wanted.name + (f" ({configuration})" if configuration else "")


def _is_here(model: pretrained.PretrainedModel) -> bool:
    try:
        if model.folder is not None:
            return True
    except InputError:
        return True
    names = ("model.safetensors", "model.safetensors.index.json")
    found = [try_to_load_from_cache(model.name_or_path, n, revision=model.revision) for n in names]
    return any(isinstance(path, str) for path in found)
