"""Wall time of a study on this machine: from a timed step, from earlier runs, or from the machine's speed."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from flatbench.errors import InputError
from flatbench.estimate import counters, earlier_runs
from flatbench.estimate.counters import Counter, Read, runs
from flatbench.machine.device import device
from flatbench.models import weights
from flatbench.models.quiet import quiet
from flatbench.runs import measure as measuring_runs
from flatbench.runs import open as opening
from flatbench.store import StudyFolder
from flatbench.study import Condition, Study
from flatbench.study.methods import Method
from flatbench.training.trainer import Trainer

#: seconds that timing may take in all, and operations of a step above which none is timed on a CPU
BUDGET, LARGEST = 8.0, 1e11
#: steps before the clock, and at most on it
WARM, TIMED = 1, 5
#: share of the speed of a large matrix product that training reaches, where no step was timed
EFFICIENCY = 0.5
#: how much longer an operation of a measure takes than one of a training step: attention is in its plain
#: form, but a kept graph saves its forward pass. By three small twins (benchmarks/results/planning.json)
MEASURE = 1.0
#: predicted over measured, and the other way round: of a timed step, and of none
ERROR, GUESS = 2, 3


@dataclass(frozen=True)
class MethodTime:
    """One method in one condition, one run after the other.

    Attributes:
        basis: "earlier runs", "a timed step", or "the machine's speed".
        seconds: of a tuning run, and of a final run.
    """

    condition: str
    method: str
    tuning_runs: int
    final_runs: int
    seconds: tuple[float, float]
    basis: str

    @property
    def total(self) -> float:
        """Seconds of all runs."""
        return self.tuning_runs * self.seconds[0] + self.final_runs * self.seconds[1]


@dataclass(frozen=True)
class WallTime:
    """A study's wall time.

    Attributes:
        unknown: what could not be found out, and why.
    """

    times: tuple[MethodTime, ...]
    unknown: tuple[str, ...]

    @property
    def total(self) -> float:
        """Seconds of all runs of which they are known, one after the other."""
        return sum(one.total for one in self.times)

    @property
    def error(self) -> int:
        """The factor within which it is meant to hold."""
        return GUESS if any(one.basis == "the machine's speed" for one in self.times) else ERROR


def wall_time(study: Study, folder: StudyFolder, budget: float = BUDGET) -> WallTime:
    """How long the study's runs take on this machine, finished ones too.

    Args:
        folder: where earlier runs are looked for.
        budget: seconds that timing may take.
    """
    ends = time.monotonic() + budget
    earlier = earlier_runs.seconds(folder.places() if folder.file.is_file() else ())
    found: list[MethodTime] = []
    unknown: list[str] = []
    shared: counters.Shared = {}
    speeds: dict[str, float] = {}
    for condition in study.conditions:
        try:
            counted = counters.counter(study, condition, shared)
        except InputError as error:
            unknown.append(f"{condition.label}: {error}" if condition.label else str(error))
            continue
        clock = _Clock(counted, condition, ends, speeds)
        for method in condition.methods:
            trials = [condition.configured(method, choice) for choice in condition.trials[method.name]]
            try:
                seconds, basis = clock.seconds(method, trials)
            except Exception as error:  # whatever a model says that is run for the first time
                reason = " ".join(str(error).split())[:200]
                where = f"{condition.label}: " if condition.label else ""
                unknown.append(f"{where}{method.name}: {type(error).__name__}: {reason}")
                continue
            known = [earlier.get((condition.label, method.name, stage)) for stage in ("tune", "final")]
            if all(known) or (known[1] and study.file.tune is None):
                seconds, basis = (known[0] or 0.0, known[1] or 0.0), "earlier runs"
            tuning, final = runs(study, condition, method)
            found.append(MethodTime(condition.label, method.name, tuning, final, seconds, basis))
    return WallTime(tuple(found), tuple(unknown))


class _Clock:
    """Times a condition's steps, as long as there is time for it."""

    def __init__(self, counted: Counter, condition: Condition, ends: float, speeds: dict[str, float]) -> None:
        self.counted, self.condition, self.ends, self.speeds = counted, condition, ends, speeds

    def seconds(self, method: Method, trials: list[Method]) -> tuple[tuple[float, float], str]:
        """Seconds of a tuning and of a final run, and what they are from."""
        timed = self._time_step(method)
        speed = timed.speed if timed else self._speed(method)
        tuned: list[float] = []
        last: list[float] = []
        for trial in trials:
            gradient = self.counted.passes(trial)[0] * self.counted.gradients_per_step(trial)
            steps = self.counted.steps(trial)
            training = gradient * steps * min(trial.train.batch_size, self.counted.sizes["train"])
            stepping = steps * timed.step if timed else training / speed
            fixed = timed.fixed if timed else 0.0
            for final, into in ((False, tuned), (True, last)):
                operations, more = self.counted.run(trial, final)
                rest = max(operations - training, 0.0) / speed
                into.append(fixed + stepping + rest + MEASURE * more / speed)
        # where there is no time left, the speed is that of another method's step
        basis = "a timed step" if timed or "timed" in self.speeds else "the machine's speed"
        return (mean(tuned), mean(last)), basis

    def _time_step(self, method: Method) -> _Timed | None:
        counted = self.counted
        per_step = counted.passes(method)[0] * counted.gradients_per_step(method) * method.train.batch_size
        on_cpu = device().type == "cpu"
        if not isinstance(counted, Read) or (on_cpu and per_step > LARGEST) or time.monotonic() > self.ends:
            return None
        if method.train.processes > 1 or method.train.accelerate:
            return None
        with measuring_runs.cpu_threads(method.train.threads), quiet():
            found = _time(counted, method)
        self.speeds["timed"] = found.speed
        return found

    def _speed(self, method: Method) -> float:
        """Operations a second: of the last timed step, or a share of those of a large matrix product."""
        if "timed" in self.speeds:
            return self.speeds["timed"]
        precision = "bf16" if method.train.precision == "bf16" else "fp32"
        if precision not in self.speeds:
            self.speeds[precision] = EFFICIENCY * _product_speed(precision)
        return self.speeds[precision]


@dataclass(frozen=True)
class _Timed:
    """Attributes: seconds of a step; seconds of a run beside its steps; operations a second."""

    step: float
    fixed: float
    speed: float


def _time(counted: Read, method: Method) -> _Timed:
    """Some steps of a run, which is then forgotten."""
    began = time.perf_counter()
    task: Any = counted.task
    model = opening.adapted(task, task.build_model(counted.seed), method.adapter)
    build = time.perf_counter() - began
    trainer = Trainer(task, model, counted.splits, method.train, method.optimizer, counted.seed)
    steps, taken = trainer.steps(), list[float]()
    for number in range(WARM + TIMED):
        began = time.perf_counter()
        if next(steps, StopIteration) is StopIteration:
            break
        _wait()
        if number >= WARM or not taken:
            taken = [*taken, time.perf_counter() - began]
    step = mean(taken)  # what other work on the machine takes is a part of it
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        weights.save(trainer.bare, Path(folder) / "adapter")
        saving = time.perf_counter() - began
    size = min(method.train.batch_size, counted.sizes["train"])
    operations = counted.passes(method)[0] * size * counted.gradients_per_step(method)
    # the model is built anew for its evaluation and for each measure
    return _Timed(step, (2 + len(counted.study.measures)) * build + saving, operations / step)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _product_speed(precision: str, size: int = 1024) -> float:
    """Operations a second of a matrix product on this machine's device."""
    dtype = torch.bfloat16 if precision == "bf16" and device().type == "cuda" else torch.float32
    size = size if device().type == "cpu" else 8 * size
    a = torch.ones(size, size, dtype=dtype, device=device())
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        _wait()
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)
