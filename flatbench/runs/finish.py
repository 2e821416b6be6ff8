"""Train, evaluate and measure one run directory."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from flatbench.config.sections import TrainOptions
from flatbench.curvature.operators.losses import HALF
from flatbench.distributed import processes as distributed
from flatbench.errors import DivergedError, InputError, StorageError, shown
from flatbench.machine import stopping
from flatbench.models import weights as model_weights
from flatbench.models.factors import trainable_parameters
from flatbench.models.quiet import quiet
from flatbench.runs import measure as measuring
from flatbench.runs import open as opening
from flatbench.runs import out_of_memory
from flatbench.runs.resume import UnusableStateError, run_with_weights, start_or_resume, start_training
from flatbench.runs.trackers import Trackers
from flatbench.security.secrets import redacted
from flatbench.store import RunDirectory, claims, events
from flatbench.store.claims import Claim, ClaimLostError
from flatbench.training.trainer import Trainer, fixed_batches


def finish(path: Path, threads: int | None = None, jobs: int = 1, lease: float = claims.LEASE) -> str:
    """Bring a run directory to its end, from wherever it is: train, evaluate, measure.

    Calling it again does only what is missing. An exception of the run's own (a loss that is not finite,
    a bug in a plug-in, no memory) is recorded in failure.json and not raised.

    Args:
        path: a run directory with its run.json.
        threads: CPU threads, unless the run's ``train.threads`` says how many or it was begun with others.
        jobs: how many runs share the machine, for the record.
        lease: seconds without a sign of life after which other machines may take the run over.

    Returns:
        The run's state afterwards: done, diverged or failed; or "elsewhere": another process is at it.

    Raises:
        StorageError: the directory cannot be written.
        Stopped: this process was asked to stop; what was trained is saved.
    """
    directory = RunDirectory(path)
    spec = directory.spec()
    if directory.complete(spec):
        return "done"
    try:
        with claims.claimed(directory.path, lease) as claim:
            if claim is None:
                return "elsewhere"
            directory.claim = claim
            with events.logged(directory.path), stopping.working(), _record_stops(directory):
                return _finish(directory, claim, threads, jobs)
    except ClaimLostError:
        return "elsewhere"


@contextlib.contextmanager
def _record_stops(directory: RunDirectory) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        events.record(directory.path, "stopped", by=str(stop) or "Ctrl-C")
        raise


def _finish(directory: RunDirectory, claim: Claim, threads: int | None, jobs: int) -> str:
    spec = directory.spec()
    if directory.complete(spec):
        return "done"  # by another process, in the moment before this one claimed it
    directory.sweep()
    if broken := directory.heal():
        events.record(directory.path, "damaged", files=broken)
    directory.forget("failure", "done")
    if claim.after is not None:
        events.record(directory.path, "taken over", killed_for_memory=out_of_memory.killed_for_memory(claim))
    try:
        own_threads = measuring.own_threads(directory) or threads
        with quiet(), measuring.cpu_threads(own_threads), Trackers(directory) as trackers:
            if directory.result() is None:
                _train(directory, jobs, trackers, out_of_memory.killed_for_memory(claim))
            measuring.take_measures(directory, directory.pending_measures(spec))
            trackers.result()
            directory.forget_states()
            directory.forget("progress")
            directory.finish(spec["measures"])
    except (StorageError, ClaimLostError):
        raise  # the other runs cannot be written either, and this one goes on when there is space
    except Exception as error:
        return _record_failure(directory, error)
    events.record(directory.path, "done")
    return "done"


def _record_failure(directory: RunDirectory, error: Exception) -> str:
    kind = "diverged" if isinstance(error, DivergedError) else "failed"
    text = redacted(shown(f"{type(error).__name__}: {error}".partition("\n")[0], 2000))
    if out_of_memory.out_of_memory(error):
        text = f"out of memory ({text}); {out_of_memory.ADVICE}"
    directory.write("failure", {"state": kind, "error": text, "traceback": redacted(traceback.format_exc())})
    events.record(directory.path, kind, error=text)
    return kind


def _train(directory: RunDirectory, jobs: int, trackers: Trackers, died_of_memory: bool = False) -> None:
    """Train and evaluate; with half the micro-batch, once, if memory ran out and the study allows that."""
    if died_of_memory:
        size, reason = _next_micro_batch_size(directory), "the process was killed for want of memory"
    else:
        try:
            _train_as_it_is(directory, jobs, trackers)
            return
        except Exception as error:
            size = _next_micro_batch_size(directory) if out_of_memory.out_of_memory(error) else None
            if size is None:
                raise
            reason = redacted(f"{type(error).__name__}: {error}".partition("\n")[0])
    # outside of the handler, whose exception holds the graph that did not fit
    if size is not None:
        events.record(directory.path, "smaller micro-batch", micro_batch_size=size, error=reason)
        smaller = {"micro_batch_size": size, "memory_ran_out": reason}
        directory.write("environment", {**(directory.environment() or {}), **smaller})
    _train_as_it_is(directory, jobs, trackers)


def _next_micro_batch_size(directory: RunDirectory) -> int | None:
    options = TrainOptions.model_validate(directory.spec()["config"]["train"])
    return out_of_memory.smaller(options, directory.environment() or {})


def _train_as_it_is(directory: RunDirectory, jobs: int, trackers: Trackers) -> None:
    session = start_or_resume(directory, jobs)
    session.trackers = trackers
    processes = session.trainer.options.processes
    if processes > 1:
        # it has found the state to go on from and written down where; the processes make their own
        del session
        distributed.launch(_train_together, directory.path, processes, directory.check_claim)
    else:
        with stopping.deferred():
            session.trainer.run(session.after_epoch, session.after_step)
        _finish_training(directory, session.trainer, session.run)
    events.record(directory.path, "trained")


def _train_together(path: Path) -> None:
    """What each of several processes does with a run that their parent has claimed; the first one writes.

    The state is saved after epochs only: within one, each process has random numbers of its own.
    """
    directory = RunDirectory(path)
    with quiet():
        session = start_training(directory)
        found = [p for p in (directory.state_file, directory.previous_state_file) if p.is_file()]
        if found:
            try:
                session.resume(found[0])
            except UnusableStateError as error:
                raise InputError(f"{found[0]}: {error}") from error
        trainer = session.trainer
        if trainer.processes.main:
            session.trackers = Trackers(directory)
        with session.trackers or contextlib.nullcontext():
            trainer.run(session.after_epoch)
        # what the shards hold can only be put together by all
        weights = trainer.weights() if trainer.sharded else None
        if trainer.processes.main:
            run = session.run if weights is None else run_with_weights(directory, weights)
            _finish_training(directory, trainer, run)


def _finish_training(directory: RunDirectory, trainer: Trainer, run: opening.OpenRun) -> None:
    """Write down what was trained, and what it is worth."""
    directory.write_history(trainer.history)
    directory.check_claim()
    model_weights.save(run.model, directory.adapter)
    cost = {**trainer.cost(), "jobs": (directory.environment() or {}).get("jobs")}
    if trainer.options.micro_batch_size != run.train.micro_batch_size:
        cost["micro_batch_size"] = trainer.options.micro_batch_size
    # what is evaluated is what was saved
    trained = run.model
    run = opening.open_run(directory, trained=True)
    model_weights.check_same(trained, run.model)
    metrics = _evaluate(run)
    if metrics["train" if "train" in metrics else "validation"]["loss"] is None:
        raise DivergedError("the loss is not finite after training")
    directory.write(
        "result",
        {
            "metrics": metrics,
            "training": cost,
            "data": run.task.describe(),
            "notes": [*trainer.options.notes, *_coarse_weights(trained)],
            "weights": model_weights.saved_digest(directory.adapter),
        },
    )


def _coarse_weights(model: nn.Module) -> list[str]:
    """A note where what trains is in half precision: most small updates of it are rounded away."""
    trained = trainable_parameters(model)
    coarse = {n: p for n, p in trained.items() if p.dtype in HALF}
    if not coarse:
        return []
    count, whole = (sum(p.numel() for p in own.values()) for own in (coarse, trained))
    dtype = str(next(iter(coarse.values())).dtype).removeprefix("torch.")
    return [
        f"{count} of {whole} trained weights are in {dtype} (model.dtype; {next(iter(coarse))}): updates "
        "below half a step of that precision are rounded away, while methods that train float32 weights lose "
        "none; without model.dtype, train.precision: bf16 keeps all weights in float32"
    ]


def _evaluate(run: opening.OpenRun) -> dict[str, dict[str, float | None]]:
    """Losses and metrics of each split.

    The test split is read by final runs only, and the training split gone through once more: of a tuning
    run nothing but the validation metric is asked, and its training data are often the most of its data.
    """
    device = opening.place(run.model)
    splits = {"validation": run.splits.validation}
    if run.config["stage"] == "final":
        splits = {"train": run.splits.train, **splits, "test": run.splits.test, **run.splits.more_tests}
    found: dict[str, dict[str, float | None]] = {}
    for name, examples in splits.items():
        values = run.task.evaluate(
            run.model, fixed_batches(run.task, examples, run.train.eval_batch_size, device)
        )
        if name not in ("train", "validation"):
            values |= run.task.test_metrics(run.model, examples, run.train.eval_batch_size)
        found[name] = {key: value if math.isfinite(value) else None for key, value in values.items()}
    return found
