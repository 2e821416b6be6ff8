"""Runs as jobs of a SLURM cluster, submitted with submitit."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, Protocol

import psutil
from pydantic import Field

from flatbench.config.sections import MOST_THREADS
from flatbench.errors import InputError
from flatbench.executors.base import Ended, Executor, own_variables
from flatbench.executors.local import cores
from flatbench.machine import stopping
from flatbench.store import RunDirectory, claims, events

#: jobs of one array; SLURM's own limit (MaxArraySize) is 1001 where nobody changed it
_ARRAY = 1000

log = logging.getLogger(__name__)


class Slurm(Executor):
    """Every run is a job, and the jobs of a study are an array.

    A job that is preempted, or reaches its time limit, saves where the run is and is put into the queue
    again. The command that submitted the jobs may end: the jobs go on, ``flatbench status`` shows them, and
    the same command run again finds them by what their run directories say.

    Args:
        cluster: ``slurm``; or ``local``, which starts the same jobs as processes of this machine, to try
            them; or ``debug``, in this process, with Python's debugger where a job raises.
        folder: where submitit keeps job scripts, what it pickles, and the jobs' logs; every machine must see
            it.
        at_once: runs side by side: of each array on SLURM (as many as the cluster grants if not given), in
            all on ``local`` (what the cores are enough for).
        cpus_per_run: cores of a run, and its threads.
        gpus_per_run: GPUs of a run.
        memory_gb: memory of a run in GiB; the cluster's default if not given.
        minutes: time limit of a job.
        time_outs: how often a job that reaches its time limit is continued by another.
        setup: lines of shell to run before each job, such as ``module load cuda``.
        parameters: further options of sbatch, as submitit names them: ``partition``, ``account``, ``qos``,
            ``constraint``, ``additional_parameters``, … .

    Raises InputError where submitit or SLURM is missing, and for options that submitit does not know.
    """

    def __init__(
        self,
        *,
        cluster: Literal["slurm", "local", "debug"] = "slurm",
        folder: Path = Path("slurm-jobs"),
        at_once: Annotated[int, Field(ge=1)] | None = None,
        cpus_per_run: Annotated[int, Field(ge=1, le=MOST_THREADS)] = 1,
        gpus_per_run: Annotated[int, Field(ge=0)] = 0,
        memory_gb: Annotated[float, Field(gt=0)] | None = None,
        minutes: Annotated[int, Field(ge=1)] = 240,
        time_outs: Annotated[int, Field(ge=0)] = 20,
        setup: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self.cluster, self.folder = cluster, Path(folder)
        self.at_once, self.cpus_per_run, self.gpus_per_run = at_once, cpus_per_run, gpus_per_run
        self.memory_gb, self.minutes, self.time_outs = memory_gb, minutes, time_outs
        self.setup, self.parameters = list(setup), dict(parameters or {})
        self.apart = cluster != "debug"
        if cluster == "local":
            self.slots = at_once or max(1, cores() // cpus_per_run)
        elif cluster == "debug":
            self.slots = 1
        if self.parameters and cluster != "slurm":
            raise InputError(f"parameters are sbatch's; with cluster {cluster} there is nobody to take them")
        self._submitit = _submitit(self.folder, cluster, time_outs)
        self._jobs: dict[Path, _Job] = {}
        self._processes: list[psutil.Process] = []

    def submit(self, paths: Sequence[Path]) -> None:
        """Submit a job a run; those of an earlier submission that are still in the queue are taken on."""
        self._configure()
        self._processes = [process for process in self._processes if _runs(process)]
        for results in {path.parents[1] for path in paths}:  # of one study, as a rule
            if self.folder.resolve().is_relative_to(results.resolve()):
                raise InputError(
                    f"folder {self.folder} of the slurm executor lies in the results, which hold no pickled "
                    "data; name another one"
                )
        found = self._adopt_jobs(paths)
        self._jobs |= found
        new = [path for path in paths if path not in found]
        for start in range(0, len(new), _ARRAY):
            self._submit(new[start : start + _ARRAY])

    def ended(self, timeout: float) -> list[Ended]:
        """Look at run directories, and at the queue, until a run is through."""
        until = time.monotonic() + timeout
        while True:
            began = time.monotonic()
            over = [end for path, job in self._jobs.items() if (end := self._poll(path, job)) is not None]
            for end in over:
                self._jobs.pop(end.path)
            if over or time.monotonic() >= until:
                return over
            # thousands of queued runs on a network file system take their time to look through
            time.sleep(max(0.2 if self.cluster == "local" else 2.0, 5 * (time.monotonic() - began)))

    def close(self) -> None:
        """Leave a cluster's jobs to themselves; processes of this machine get `grace` seconds to save."""
        waiting = [job for job in self._jobs.values() if isinstance(job, _ClusterJob)]
        if waiting:
            names = sorted({job.job.job_id.partition("_")[0] for job in waiting})
            log.warning(
                "%d jobs go on by themselves; `scancel %s` would end them", len(waiting), " ".join(names)
            )
        self._jobs = {}
        trees = [_tree(process) for process in self._processes]
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()  # submitit's process passes it on to the one that trains
        _, alive = psutil.wait_procs(self._processes, timeout=self.grace)
        for tree in trees:
            for process in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        psutil.wait_procs(alive, timeout=self.grace)
        self._processes = []

    def _configure(self) -> None:
        if self.cluster == "debug":
            return
        limits: dict[str, Any] = {"signal_delay_s": max(1, int(self.grace)), "setup": self.setup}
        if self.cluster == "local":
            limits |= {"timeout_min": self.minutes, "gpus_per_node": self.gpus_per_run}
        else:
            limits |= {"time": self.minutes, "job_name": "flatbench", "cpus_per_task": self.cpus_per_run}
            if self.gpus_per_run:
                limits["gpus_per_node"] = self.gpus_per_run
            if self.memory_gb is not None:
                limits["mem"] = f"{int(self.memory_gb * 1024)}MB"
            if self.at_once is not None:
                limits["array_parallelism"] = self.at_once
        try:
            self._submitit.update_parameters(**{**limits, **self.parameters})
        except (ValueError, TypeError) as error:
            raise InputError(f"parameters of the slurm executor: {error}") from None

    def _submit(self, paths: Sequence[Path]) -> None:
        if self.cluster == "debug":
            from flatbench.runs.finish import finish

            for path in paths:
                job = self._submitit.submit(finish, path, self.cpus_per_run, 1, self.lease)
                self._jobs[path] = _DebugJob(job)
            return
        beside = self.slots or 1
        works = [Work(path.resolve(), self.cpus_per_run, beside, self.lease) for path in paths]
        try:
            with _no_interrupts(), self._submitit.batch():
                jobs = [self._submitit.submit(work) for work in works]
        except Exception as error:
            raise InputError(f"the jobs could not be submitted: {error}") from error
        for path, job in zip(paths, jobs, strict=True):
            written = str(job.paths.stderr)
            events.record(path, events.SUBMITTED, cluster=self.cluster, job=job.job_id, log=written)
            if self.cluster == "local":
                process = psutil.Process(int(job.job_id))
                self._processes.append(process)
                self._jobs[path] = _Process(process, written)
            else:
                self._jobs[path] = _ClusterJob(job)

    def _adopt_jobs(self, paths: Sequence[Path]) -> dict[Path, _Job]:
        """The jobs of an earlier submission that live."""
        found: dict[Path, _Job] = {}
        for path in paths if self.cluster != "debug" else ():
            last = next((e for e in reversed(events.read(path)) if e["event"] == events.SUBMITTED), None)
            if last is None or last.get("cluster") != self.cluster:
                continue
            if self.cluster == "slurm":
                from submitit import SlurmJob

                found[path] = _ClusterJob(SlurmJob(self.folder, str(last["job"])))
            elif (process := _controller(str(last["job"]))) is not None:
                self._processes.append(process)
                found[path] = _Process(process, str(last["log"]))
        # asked for after all are known: the cluster is asked once
        return {path: job for path, job in found.items() if job.lives()}

    def _poll(self, path: Path, job: _Job) -> Ended | None:
        directory = RunDirectory(path)
        if directory.settled() and claims.holder(path) is None:
            return Ended(path, directory.state())
        how = job.over()
        if how is None:
            return None
        if directory.settled():
            return Ended(path, directory.state())
        return Ended(path, "elsewhere") if claims.holder(path) is not None else Ended(path, None, how)


class Work:
    """What a job does: it finishes a run, or saves and asks for another job that goes on.

    Pickled by submitit, which wants ``checkpoint`` to know that another job can go on.
    """

    def __init__(self, path: Path, threads: int, jobs: int, lease: float) -> None:
        self.path, self.threads, self.jobs, self.lease = path, threads, jobs, lease
        self.variables = own_variables()

    def __call__(self) -> str:
        """The run's state; ``interrupted`` if the job was cancelled."""
        from submitit import JobEnvironment

        os.environ.update(self.variables)
        preemption = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
        requeue: Any = signal.getsignal(preemption)
        asked = False
        with stopping.heeded([*stopping.SIGNALS, preemption], patient=True):
            stop: Any = signal.getsignal(preemption)

            def note(number: int, frame: FrameType | None) -> None:
                nonlocal asked
                asked = True
                stop(number, frame)

            signal.signal(preemption, note)
            try:
                from flatbench.runs.finish import finish  # takes seconds, in which signals are heeded as well

                return finish(self.path, self.threads, self.jobs, self.lease)
            except KeyboardInterrupt:
                pass  # saved, and the claim let go
        if asked:
            requeue(preemption, None)  # submitit's: it ends this process
        return "interrupted"

    def checkpoint(self) -> Any:
        """What the next job does: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class _Job(Protocol):
    """A job of whatever kind."""

    def lives(self) -> bool:
        """Whether it is known to be in the queue or to run."""

    def over(self) -> str | None:
        """How it ended, in a few words; None while it has not."""


@dataclass
class _ClusterJob:
    """A job of a cluster; sacct is asked, at most every few seconds for all jobs together."""

    job: Any

    def lives(self) -> bool:
        return not self.job.done() and self.job.state != "UNKNOWN"

    def over(self) -> str | None:
        if not self.job.done():
            return None
        state = self.job.get_info(mode="force").get("State", "unknown to sacct")
        return f"job {self.job.job_id} ended as {state}; its log: {self.job.paths.stderr}"


@dataclass
class _Process:
    """A job on this machine: submitit's process, which starts another one that trains."""

    process: psutil.Process
    log: str

    def lives(self) -> bool:
        return _runs(self.process)

    def over(self) -> str | None:
        return None if self.lives() else f"process {self.process.pid} ended; its log: {self.log}"


@dataclass
class _DebugJob:
    """A job that is done when it is asked whether it is."""

    job: Any

    def lives(self) -> bool:
        return False

    def over(self) -> str | None:
        return f"ended as {self.job.result()}"


def _submitit(folder: Path, cluster: str, time_outs: int) -> Any:
    try:
        import submitit
    except ImportError:
        raise InputError("the slurm executor needs submitit: pip install 'flatbench-lora[slurm]'") from None
    if cluster == "debug":
        return submitit.DebugExecutor(folder)
    kind = submitit.SlurmExecutor if cluster == "slurm" else submitit.LocalExecutor
    try:
        return kind(folder, max_num_timeout=time_outs)
    except RuntimeError:
        raise InputError(
            "the slurm executor finds no srun: this machine is no login node of a SLURM cluster "
            "(cluster: local tries the jobs on this machine)"
        ) from None
    except OSError as error:
        raise InputError(f"folder of the slurm executor: {error}") from None


def _controller(number: str) -> psutil.Process | None:
    """The process of this number if it is one that submitit started for a job."""
    with contextlib.suppress(psutil.Error, ValueError):
        process = psutil.Process(int(number))
        if "submitit.local._local" in process.cmdline():
            return process
    return None


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and those below it; empty if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes started in the block ignore SIGINT: a terminal's Ctrl-C would have submitit kill the training
    while it saves. `Work` heeds it all the same."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
