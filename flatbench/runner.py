"""A run directory in, the same directory finished: the only place where task, optimizer and measures meet."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatbench import adapters, environment, measures, state, tasks
from flatbench.errors import DivergedError, InputError, NotApplicableError, StorageError
from flatbench.measures.base import MeasureInterrupted, Subject
from flatbench.measures.tracking import Tracker
from flatbench.options import AdapterOptions, TrainOptions
from flatbench.redaction import redacted
from flatbench.seeding import derive_seed
from flatbench.store import RunDirectory
from flatbench.tasks import pretrained
from flatbench.tasks.base import Splits, Task
from flatbench.training import Trainer, fixed_batches


@dataclass
class OpenRun:
    """A run's task, data and model as its configuration describes them.

    Attributes:
        model: pretrained weights and a fresh adapter, or what was trained if it was loaded.
    """

    config: Mapping[str, Any]
    task: Task
    splits: Splits
    model: nn.Module

    @property
    def train(self) -> TrainOptions:
        """The ``train`` section."""
        return TrainOptions.model_validate(self.config["train"])

    @property
    def target_modules(self) -> list[str]:
        """Names of the modules that the study's adapter treats, for full fine-tuning too."""
        return list(self.config["adapter"]["target_modules"] or self.task.target_modules)


@functools.lru_cache(maxsize=2)
def _task(description: str) -> Task:
    """Tasks are kept: a worker makes many runs of one task, and reading or tokenising it takes seconds."""
    task, model = json.loads(description)
    return tasks.load(task, model)


def open_run(directory: RunDirectory, trained: bool) -> OpenRun:
    """Open a run directory.

    Args:
        trained: load what was trained; otherwise the model is at its start.

    Raises:
        InputError: no run directory, no trained weights, or damaged ones.
    """
    config = directory.spec()["config"]
    if trained:
        adapters.check(directory.adapter)
        written = (directory.result() or {}).get("weights")
        if written not in (None, adapters.file_digest(directory.adapter)):
            raise InputError(
                f"{adapters.weights_file(directory.adapter)}: not the safetensors file that this run wrote; "
                "train it again with --fresh"
            )
    task = _task(json.dumps([config["task"], config["model"]]))
    if task.fingerprint() != directory.spec()["data"]:
        raise InputError(
            f"{directory.path}: its data or its pretrained model is not what it was when the run was made; "
            "put it back, or run the study again, which makes new runs"
        )
    seed = config["seed"]
    model = task.build_model(seed)
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "initialisation", "adapter"))
        options = AdapterOptions.model_validate(config["adapter"])
        # a task may know no modules to adapt in its model; the study names them then
        targets = options.target_modules or ([] if options.name == "none" else task.target_modules)
        model = adapters.adapt(model, options, targets, task.modules_to_save)
    if trained:
        adapters.load(model, directory.adapter)
    return OpenRun(config, task, task.splits(seed), model)


def finish(path: Path, threads: int | None = None, jobs: int = 1) -> str:
    """Bring a run directory to its end, from wherever it is: train, evaluate, measure.

    Calling it again does only what is missing. An exception of the run's own (a loss that is not finite,
    a bug in a plug-in, no memory) is recorded in failure.json and not raised.

    Args:
        path: a run directory with its run.json.
        threads: CPU threads, unless the run's ``train.threads`` says how many or it was begun with others.
        jobs: how many runs share the machine, for the record.

    Returns:
        The run's state afterwards: done, diverged or failed; or "elsewhere": another process is at it.

    Raises:
        StorageError: the directory cannot be written.
    """
    directory = RunDirectory(path)
    with directory.claimed() as mine:
        if not mine:
            return "elsewhere"
        return _finish(directory, threads, jobs)


def _finish(directory: RunDirectory, threads: int | None, jobs: int) -> str:
    spec = directory.spec()
    if directory.state() == "done" and not directory.pending_measures(spec):
        return "done"
    directory.sweep()
    directory.forget("failure", "done")
    try:
        with _quiet(), _threads(_own_threads(directory) or threads):
            if directory.result() is None:
                _train(directory, jobs)
            take_measures(directory, directory.pending_measures(spec))
            directory.state_file.unlink(missing_ok=True)
            directory.forget("progress")
            directory.write("done", {"measures": sorted(spec["measures"])})
    except StorageError:
        raise  # the other runs cannot be written either, and this one goes on when there is space
    except Exception as error:
        kind = "diverged" if isinstance(error, DivergedError) else "failed"
        directory.write(
            "failure",
            {
                "state": kind,
                "error": redacted(f"{type(error).__name__}: {error}".partition("\n")[0]),
                "traceback": redacted(traceback.format_exc()),
            },
        )
        return kind
    return "done"


def _own_threads(directory: RunDirectory) -> int | None:
    """``train.threads``, or the number that the run was begun with: others give other last bits."""
    asked: int | None = directory.spec()["config"]["train"]["threads"]
    return asked or (directory.environment() or {}).get("threads")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no deprecation notes of other libraries between the lines of a study's progress."""
    with pretrained.quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
        yield


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(directory: RunDirectory, jobs: int) -> None:
    trainer, tracker, run, start = _begun(directory, jobs)

    def after_epoch(trainer: Trainer) -> None:
        if tracker.due(trainer.epoch):
            _track(tracker, trainer, run)
        saved = {"start": start, "trainer": trainer.state_dict(), "tracker": tracker.state_dict()}
        state.save(directory.state_file, saved)
        directory.write("progress", {"fraction": trainer.epoch / run.train.epochs})

    trainer.run(after_epoch)
    directory.write_history(trainer.history)
    adapters.save(run.model, directory.adapter)
    cost = trainer.cost()
    del trainer
    # what is evaluated is what was saved
    run = open_run(directory, trained=True)
    metrics = _evaluate(run)
    if metrics["train"]["loss"] is None:
        raise DivergedError("the loss is not finite after training")
    directory.write(
        "result",
        {
            "metrics": metrics,
            "training": cost,
            "data": run.task.describe(),
            "weights": adapters.file_digest(directory.adapter),
        },
    )


def _track(tracker: Tracker, trainer: Trainer, run: OpenRun) -> None:
    """Measure the model as it is now, at its unperturbed point, into a row of the history."""
    trainer.optimizer.eval()
    row = tracker.row(_subject_of(run, {}, trainer.device), trainer.epoch)
    trainer.history.append({"step": trainer.step, "epoch": trainer.epoch, **row})
    trainer.optimizer.train()


def _begun(directory: RunDirectory, jobs: int) -> tuple[Trainer, Tracker, OpenRun, str]:
    """Trainer and tracker at the run's last saved epoch, or at its beginning; the run; a digest of its start.

    The beginning is for a state that is damaged or of another start as well, which environment.json tells.
    """
    environment_now = {**environment.describe(), "jobs": jobs}
    model = directory.spec()["config"]["model"]
    if model.get("trust_remote_code"):
        environment_now["trust_remote_code"] = model["name_or_path"]
    if directory.state_file.is_file():
        trainer, tracker, run, start = _fresh(directory)
        reason = _resume(trainer, tracker, directory, start)
        if reason is None:
            return trainer, tracker, run, start
        directory.state_file.unlink()
        environment_now["restarted"] = reason
    directory.write("environment", environment_now)
    return _fresh(directory)


def _fresh(directory: RunDirectory) -> tuple[Trainer, Tracker, OpenRun, str]:
    run = open_run(directory, trained=False)
    trainer = Trainer(run.task, run.model, run.splits, run.train, run.config["optimizer"], run.config["seed"])
    return trainer, Tracker(directory.spec()["measures"]), run, adapters.digest(run.model)


def _resume(trainer: Trainer, tracker: Tracker, directory: RunDirectory, start: str) -> str | None:
    """Go on from the last epoch; or say why not, when the trainer may not be used any more."""
    try:
        saved = state.load(directory.state_file)
        if saved["start"] != start:
            return "the saved state had begun with other weights"
        trainer.load_state_dict(saved["trainer"])
        tracker.load_state_dict(saved["tracker"])
    except (InputError, KeyError, ValueError, TypeError, RuntimeError) as error:
        return f"the saved state was damaged: {type(error).__name__}: {error}"
    return None


def _evaluate(run: OpenRun) -> dict[str, dict[str, float | None]]:
    """Losses and metrics of each split; the test split is read by final runs only."""
    device = _device()
    run.model.to(device)
    splits = {"train": run.splits.train, "validation": run.splits.validation}
    if run.config["stage"] == "final":
        splits |= {"test": run.splits.test, **run.splits.more_tests}
    found: dict[str, dict[str, float | None]] = {}
    for name, examples in splits.items():
        values = run.task.evaluate(
            run.model, fixed_batches(run.task, examples, run.train.eval_batch_size, device)
        )
        if name not in ("train", "validation"):
            values |= run.task.test_metrics(run.model, examples, run.train.eval_batch_size)
        found[name] = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return found


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
    with _quiet(), _threads(_own_threads(directory)):
        subject = _subject(directory)
        for label, config in wanted.items():
            options = {key: value for key, value in config.items() if key != "name"}
            stored: dict[str, Any] = {"config": dict(config), "threads": torch.get_num_threads()}
            try:
                stored["values"] = measures.REGISTRY.load(config["name"])(**options)(subject)
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
    if failures:
        raise failures[0]


def _subject(directory: RunDirectory) -> Subject:
    run = open_run(directory, trained=True)
    device = _device()
    run.model.to(device).eval()
    return _subject_of(run, (directory.result() or {}).get("training", {}), device)


def _subject_of(run: OpenRun, training: Mapping[str, Any], device: torch.device) -> Subject:
    return Subject(
        model=run.model,
        batches=list(fixed_batches(run.task, run.splits.train, run.train.eval_batch_size, device)),
        loss=lambda model, batch: (run.task.loss(model, batch), run.task.terms(batch)),
        adapted=adapters.adapted_modules(run.model, run.target_modules),
        seed=derive_seed(run.config["seed"], "probes"),
        training=training,
    )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
