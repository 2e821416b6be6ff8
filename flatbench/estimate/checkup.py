"""Check a study's data, models, memory and disk before anything is downloaded whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled

from flatbench import tasks
from flatbench.config import sources
from flatbench.errors import InputError
from flatbench.estimate import gpu_hours
from flatbench.estimate.gpus import GPUS
from flatbench.estimate.needs import Needs, needs
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.study import Condition, Study
from flatbench.tasks.common import hub
from flatbench.tasks.common.hub import Source


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. Attributes: whether it is as it must be; what to say."""

    good: bool
    line: str

    @property
    def mark(self) -> str:
        """For a list."""
        return "ok" if self.good else "NO"


def check(study: Study, output: Path) -> list[Finding]:
    """Every finding, each once. Of data on the hub a few rows are fetched, of a model its small files.

    Args:
        output: where results are to go.
    """
    found: dict[Finding, None] = {}
    for condition in study.conditions:
        for finding in _of_condition(condition):
            found[finding] = None
    costs = gpu_hours.estimate(study, GPUS["h100"]).costs
    found |= dict.fromkeys(_of_machine(costs, needs(study, costs), output))
    return list(found)


def _of_condition(condition: Condition) -> Iterator[Finding]:
    try:
        task: Any = tasks.load(condition.task, condition.model)
        source = task.source()
    except InputError as error:
        where = f"{condition.label}: " if condition.label else ""
        yield Finding(False, f"data: {where}{error}")
        return
    model = getattr(task, "model", None)
    if source is not None and source.wanted is not None:
        yield from _on_the_hub(source)
    elif source is not None:
        yield from _in_files(condition, task, model)
    if isinstance(model, PretrainedModel):
        yield from _of_model(task, model)


def _in_files(condition: Condition, task: Any, model: Any) -> Iterator[Finding]:
    """Files are read as a run reads them, where the model is here too; else they are there."""
    where = f" ({condition.label})" if condition.label else ""
    named = str(condition.task.get("data") or "")
    try:
        # splits that need no model are the cheapest thorough look
        parts = getattr(task, "parts", None)
    except InputError as error:
        yield Finding(False, f"data{where}: {error}")
        return
    sizes = "" if parts is None else f": {', '.join(f'{k} {_length(v):,}' for k, v in parts.items())}"
    yield Finding(True, f"data{where}: files in {named}{sizes}")


def _length(part: Any) -> int:
    if isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], list):
        return len(part[1])  # images, and which of them
    return len(part)


def _on_the_hub(source: Source) -> Iterator[Finding]:
    """The first rows of every split that is read: their columns and labels."""
    wanted, known = source.wanted, source.known
    assert wanted is not None
    name = wanted.name + (f" ({wanted.configuration})" if wanted.configuration else "")
    at = f" at {wanted.revision}" if wanted.revision else ""
    for split in source.splits:
        try:
            table = hub.first_rows(wanted, split)
            hub.require_columns(table, wanted, split, optional=("hint",))
            if source.classes:
                hub.class_numbers(table, wanted, split, source.classes)
        except InputError as error:
            yield Finding(False, str(error))
            return
    checked = f", {known.licence}, checked {known.checked}" if known else ", in no table of checked sources"
    yield Finding(True, f"data: {name}{at}: {', '.join(source.splits)}{checked}")


def _of_model(task: Any, model: PretrainedModel) -> Iterator[Finding]:
    start = f"model.name_or_path: {model.name_or_path}"
    reads = hasattr(type(task), "_tokenizer") and getattr(task, "takes_text", True)
    try:
        pretrained.config(model)
        if isinstance(model, PretrainedModel) and reads:
            _ = task._tokenizer
        size = _weights(model)
    except InputError as error:
        yield Finding(False, str(error))
        return
    if size is None:
        yield Finding(False, f"{start}: {pretrained.no_safetensors(model)}")
        return
    known = sources.model(model.name_or_path)
    gate = ", gated" if known and known.gated else ""
    there = "configuration, tokenizer, safetensors" if reads else "configuration, safetensors"
    yield Finding(True, f"{start}: {there}{gate}")


def _weights(model: PretrainedModel) -> bool | None:
    """True where the model has safetensors, None where it has not. Raises InputError where none can tell."""
    if model.folder is not None:
        return True if list(model.folder.glob("*.safetensors")) else None
    try:
        files = HfApi().list_repo_files(model.name_or_path, revision=model.revision)
    except OfflineModeIsEnabled:
        names = ("model.safetensors", "model.safetensors.index.json")
        found = [try_to_load_from_cache(model.name_or_path, n, revision=model.revision) for n in names]
        return True if any(isinstance(path, str) for path in found) else None
    except Exception as error:  # whatever the hub's client raises
        raise pretrained.refusal(model, "list of files", error) from error
    return True if any(name.endswith(".safetensors") for name in files) else None


def _of_machine(costs: Any, needed: Needs, output: Path) -> Iterator[Finding]:
    if torch.cuda.is_available():
        _, memory = torch.cuda.mem_get_info()
        what = torch.cuda.get_device_name(0)
    else:
        memory, what = psutil.virtual_memory().available, "this machine, which has no GPU"
    peaks = {(cost.memory, cost.condition, cost.method) for cost in costs if cost.memory is not None}
    if peaks:
        most, condition, method = max(peaks)
        which = f"{method} ({condition})" if condition else method
        line = f"memory: about {most / 1e9:.1f} GB for {which}; {what} has {memory / 1e9:.1f} GB"
        help_ = "" if most <= memory else "; take a smaller train.micro_batch_size, or gradient checkpointing"
        yield Finding(bool(most <= memory), line + help_)
    downloads = 1e6 * sum(size or 0 for size in needed.downloads.values())
    yield from _of_disk("downloads", downloads, Path(constants.HF_HOME), "set HF_HOME to a larger disk")
    yield from _of_disk("results", needed.results or 0, output, "name another --output")


def _of_disk(what: str, wanted: float, place: Path, remedy: str) -> Iterator[Finding]:
    if not wanted:
        return
    place = place.expanduser().absolute()
    there = next(path for path in (place, *place.parents) if path.exists())
    free = shutil.disk_usage(there).free
    line = f"disk: about {wanted / 1e9:.2g} GB of {what}; {free / 1e9:.1f} GB are free at {there}"
    yield Finding(wanted <= free, line if wanted <= free else f"{line}; {remedy}")
