"""Start a run's training, or resume it from its last saved state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flatbench.errors import FlatbenchError, InputError
from flatbench.machine import environment, stopping
from flatbench.models import factors
from flatbench.models import weights as model_weights
from flatbench.runs import measure as measuring
from flatbench.runs import open as opening
from flatbench.runs.during_training import Tracker
from flatbench.runs.trackers import Trackers
from flatbench.store import RunDirectory, events, training_state
from flatbench.training.trainer import Trainer

#: seconds between saves of the state within a long epoch
CHECKPOINT_SECONDS = 300.0
#: seconds between writes of its progress
PROGRESS_SECONDS = 10.0


class UnusableStateError(FlatbenchError):
    """A saved state from which its training cannot go on."""


class TrainingSession:
    """A training where it was last saved, or at its beginning, and what happens after its steps and epochs.

    Args:
        start: digest of the weights that it began with.
        trackers: the experiment trackers that it reports to.
    """

    trackers: Trackers | None = None

    def __init__(self, directory: RunDirectory, trainer: Trainer, run: opening.OpenRun, start: str) -> None:
        self.directory, self.trainer, self.run, self.start = directory, trainer, run, start
        self.tracker = Tracker(directory.spec()["measures"])
        self._save_time = self._progress_time = time.monotonic()
        self._epoch_start = trainer.step

    def resume(self, path: Path) -> None:
        """Go on from a saved state.

        Raises UnusableStateError for one that is damaged or of another start; this object may not be used
        any more then.
        """
        try:
            saved = training_state.load(path)
            if saved["start"] != self.start:
                raise UnusableStateError("the saved state had begun with other weights")
            self.trainer.load_state_dict(saved["trainer"])
            self.tracker.load_state_dict(saved["tracker"])
        except (InputError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UnusableStateError(
                f"the saved state was damaged: {type(error).__name__}: {error}"
            ) from error
        self._epoch_start = self.trainer.step

    def after_step(self, trainer: Trainer) -> None:
        """Report, and save when this process is asked to stop, and every few minutes of a long epoch."""
        if self.trackers is not None:
            self.trackers.rows(trainer.history)
        asked = stopping.requested() is not None
        if asked or time.monotonic() - self._save_time > CHECKPOINT_SECONDS:
            self._save()
            events.record(self.directory.path, "saved", step=trainer.step)
        if time.monotonic() - self._progress_time > PROGRESS_SECONDS:
            self._progress()
        stopping.check()

    def _progress(self) -> None:
        trainer = self.trainer
        self.directory.write("progress", {"fraction": trainer.step / trainer.total_steps})
        self._progress_time = time.monotonic()

    def after_epoch(self, trainer: Trainer) -> None:
        """Take the measures that are due, save, and report."""
        if self.tracker.due(trainer.epoch):
            self._track()
        self._save()
        steps, self._epoch_start = trainer.step - self._epoch_start, trainer.step
        if trainer.processes.main:
            made = {"epoch": trainer.epoch, "step": trainer.step, "steps": steps}
            events.record(self.directory.path, "epoch", **made)
            self._progress()
        if self.trackers is not None:
            self.trackers.rows(trainer.history)
        stopping.check()

    def _save(self) -> None:
        trainer, tracker = self.trainer.state_dict(), self.tracker.state_dict()
        tree = {"start": self.start, "trainer": trainer, "tracker": tracker}
        if self.trainer.processes.main:
            self.directory.check_claim()
            training_state.save(self.directory.state_file, tree, previous=self.directory.previous_state_file)
        self._save_time = time.monotonic()

    def _track(self) -> None:
        """Measure the model as it is now, at its unperturbed point, into a row of the history."""
        trainer = self.trainer
        trainer.optimizer.eval()
        subject = measuring.subject_of(self.run, {}, trainer.device)
        row = self.tracker.row(replace(subject, optimizer=trainer.optimizer), trainer.epoch)
        trainer.history.append({"step": trainer.step, "epoch": trainer.epoch, **row})
        trainer.optimizer.train()


def run_with_weights(directory: RunDirectory, weights: Mapping[str, Tensor]) -> opening.OpenRun:
    """The run with a whole model, in which what trained has these weights."""
    run = opening.open_run(directory, trained=False, spread=False)
    for name, parameter in factors.trainable_parameters(run.model).items():
        parameter.data.copy_(weights[name])
    return run


def start_or_resume(directory: RunDirectory, jobs: int) -> TrainingSession:
    """The training where it was last saved, or at its beginning.

    The state before the last one is taken if the last one is damaged, and the beginning if both are or belong
    to another start; environment.json records it.
    """
    kept = {k: v for k, v in (directory.environment() or {}).items() if k in _KEYS_OF_RESTARTS}
    environment_now = {**environment.describe(), "jobs": jobs, **kept}
    model = directory.spec()["config"]["model"]
    if model.get("trust_remote_code"):
        environment_now["trust_remote_code"] = model["name_or_path"]
    reasons: list[str] = []
    for path in (directory.state_file, directory.previous_state_file):
        if path.is_file():
            session = start_training(directory)
            try:
                session.resume(path)
            except UnusableStateError as error:
                events.record(directory.path, "state not used", file=path.name, reason=str(error))
                reasons.append(str(error))
                path.unlink()
                continue
            if reasons:
                directory.write("environment", {**(directory.environment() or {}), "resumed": reasons[0]})
            where = {"step": session.trainer.step, "epoch": session.trainer.epoch}
            events.record(directory.path, "resumed", **where)
            return session
    if reasons:
        environment_now["restarted"] = reasons[0]
    directory.write("environment", environment_now)
    events.record(directory.path, "begun", jobs=jobs, threads=environment_now["threads"])
    return start_training(directory)


#: what a run's environment keeps when the run starts anew
_KEYS_OF_RESTARTS = ("micro_batch_size", "memory_ran_out")


def start_training(directory: RunDirectory) -> TrainingSession:
    """A run's training at its beginning."""
    options = opening.train_options(directory)
    run = opening.open_run(directory, trained=False, spread=not options.sharded)
    start = model_weights.digest(run.model)  # before a trainer divides the model
    trainer = Trainer(run.task, run.model, run.splits, options, run.config["optimizer"], run.config["seed"])
    return TrainingSession(directory, trainer, run, start)
