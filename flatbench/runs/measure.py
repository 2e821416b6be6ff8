"""Measures of a trained run, stored in its directory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from flatbench import measures
from flatbench.errors import NotApplicableError
from flatbench.measures.base import MeasureInterrupted, checked
from flatbench.models import factors
from flatbench.models.quiet import quiet
from flatbench.runs import open as opening
from flatbench.runs import paired_cost
from flatbench.seeding import derive_seed
from flatbench.store import RunDirectory, events
from flatbench.subject.subject import Subject
from flatbench.training.trainer import fixed_batches


def take_measures(directory: RunDirectory, wanted: Mapping[str, Mapping[str, Any]]) -> None:
    """Measure a trained run and store what was found, a file a measure.

    Args:
        wanted: label -> {"name": …, options}.

    Raises:
        InputError: the run is not trained or its weights are damaged.
    """
    if not wanted:
        return
    failures = []
    with quiet(), cpu_threads(own_threads(directory)):
        subject = _subject(directory)
        for label, config in wanted.items():
            options = {key: value for key, value in config.items() if key != "name"}
            stored: dict[str, Any] = {"config": dict(config), "threads": torch.get_num_threads()}
            try:
                measure = measures.REGISTRY.load(config["name"])(**options)
                stored["values"] = checked(label, measure(subject))
            except NotApplicableError as reason:
                stored["skipped"] = str(reason)
            except MeasureInterrupted as partial:
                directory.write(
                    f"measures/{label}", {**stored, "values": partial.values, "interrupted": True}
                )
                raise
            except Exception as error:
                failures.append(error)  # the other measures are taken all the same
                continue
            directory.write(f"measures/{label}", stored)
            events.record(directory.path, "measured", label=label)
    if failures:
        raise failures[0]


def _subject(directory: RunDirectory) -> Subject:
    run = opening.open_run(directory, trained=True)
    device = opening.place(run.model)
    run.model.eval()
    subject = subject_of(run, (directory.result() or {}).get("training", {}), device)
    return replace(subject, pair=functools.partial(paired_cost.paired, directory))


def subject_of(run: opening.OpenRun, training: Mapping[str, Any], device: torch.device) -> Subject:
    """What measures are given of a run, with its model where it is."""

    def batches(examples: Sequence[Any]) -> list[Mapping[str, Any]]:
        return list(fixed_batches(run.task, examples, run.train.eval_batch_size, device))

    return Subject(
        model=run.model,
        batches=batches(run.splits.train),
        loss=lambda model, batch: (run.task.loss(model, batch), run.task.terms(batch)),
        adapted=factors.adapted_modules(run.model, run.target_modules),
        seed=derive_seed(run.config["seed"], "probes"),
        training=training,
        others={"validation": functools.partial(batches, run.splits.validation)},
    )


def own_threads(directory: RunDirectory) -> int | None:
    """``train.threads``, or the number that the run was begun with: others give other last bits."""
    asked: int | None = directory.spec()["config"]["train"]["threads"]
    return asked or (directory.environment() or {}).get("threads")


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """So many CPU threads within the block; as many as there were if None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
