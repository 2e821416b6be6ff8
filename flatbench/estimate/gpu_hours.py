"""Estimate a study's GPU hours from counted operations, before any of it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from torch import nn

from flatbench import tasks
from flatbench.errors import InputError
from flatbench.estimate import counters, measuring, sketches
from flatbench.estimate.gpus import GPU
from flatbench.models import pretrained
from flatbench.study import Condition, Study
from flatbench.study.methods import Method

#: seconds until a layer is asked for, forward and backward: what small batches wait for
LAUNCH = 1e-4
#: share of the peak that training is assumed to reach (model FLOPs utilisation)
UTILISATION = 0.2


@dataclass(frozen=True)
class MethodCost:
    """One method in one condition.

    Attributes:
        gflops_per_example: what the measure ``cost`` calls so: 10⁹ operations of a step for one example, on
            average over the method's trials; None where model or data are not at hand.
        operations: of all tuning and final runs, evaluation after training included; None as above.
        hours: on the estimate's GPU, those of measures and generated texts included; None as above.
        measuring: share of the hours that these take.
        memory: peak bytes of training.
        trained: weights that train, which every run writes down.
    """

    condition: str
    method: str
    tuning_runs: int
    final_runs: int
    gradients_per_step: float | None
    gflops_per_example: float | None
    operations: float | None
    hours: float | None
    measuring: float | None = None
    memory: float | None = None
    trained: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A study's cost on one GPU.

    Attributes:
        utilisation: share of the peak that was assumed.
        unknown: what could not be found out, and why.
        excluded: what the study does beside, and is not counted.
        assumed: conditions whose numbers of examples and lengths are those of the table of sources.
    """

    study: str
    gpu: GPU
    utilisation: float
    costs: Sequence[MethodCost]
    unknown: Sequence[str]
    excluded: Sequence[str]
    assumed: Sequence[str] = ()

    @property
    def hours(self) -> float:
        """Hours of all methods of which they are known."""
        return sum(cost.hours for cost in self.costs if cost.hours is not None)

    @property
    def operations(self) -> float:
        """Operations of all methods of which they are known."""
        return sum(cost.operations for cost in self.costs if cost.operations is not None)


def estimate(study: Study, on: GPU, utilisation: float = UTILISATION) -> Estimate:
    """The cost of all runs of a study, finished ones too.

    ``hours = Σ operations / (peak · utilisation) / 3600``, and no gradient faster than its layers can be
    asked for (`LAUNCH` each). The operations of a run are those of its epochs' gradients, of its evaluations,
    and for a final run of its measures and generated texts. They are counted on the shapes of the first
    batches that it would train on where data and model are files, else on what the table of sources knows:
    nothing is downloaded but the configuration of a model that it does not have.

    Raises InputError for a utilisation outside (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise InputError(f"--mfu: {utilisation} is no share of the peak; give one above 0 and up to 1")
    costs: list[MethodCost] = []
    unknown: list[str] = []
    options = study.measures.items()
    excluded = [f"the measure {label}" for label, one in options if measuring.gradients(one, 1) is None]
    assumed: list[str] = []
    shared: counters.Shared = {}
    for condition in study.conditions:
        try:
            counted = counters.counter(study, condition, shared)
        except InputError as error:
            label = f"{condition.label}: " if condition.label else ""
            unknown.append(f"{label}operations and examples: {error}")
            unknown += [f"{label}{line}" for line in _model_size_notes(condition)]
            costs += [_cost_without_operations(study, condition, method) for method in condition.methods]
            continue
        costs += [_cost(study, condition, method, counted, on, utilisation) for method in condition.methods]
        if not counted.known:
            assumed.append(condition.label)
    return Estimate(study.name, on, utilisation, costs, unknown, excluded, assumed)


def _cost_without_operations(study: Study, condition: Condition, method: Method) -> MethodCost:
    return MethodCost(
        condition.label, method.name, *counters.runs(study, condition, method), None, None, None, None
    )


def _cost(
    study: Study,
    condition: Condition,
    method: Method,
    counted: counters.Counter,
    on: GPU,
    utilisation: float,
) -> MethodCost:
    tuning, final = counters.runs(study, condition, method)
    trials = [condition.configured(method, choice) for choice in condition.trials[method.name]]
    # which trial is chosen is not known yet: a final run costs what they cost on average
    half = condition.model.get("dtype") == "bfloat16" or condition.model.get("quantization")
    bf16 = method.train.precision == "bf16" or half
    rate = on.peak("bf16" if bf16 else "fp32") * utilisation
    gradients = [counted.gradients_per_step(trial) for trial in trials]
    # shapes do not depend on what a grid tries, but for what changes the number of gradients or of steps
    least = LAUNCH * counted.weights(method)[2]
    tuned, last, more = [], [], []
    for trial, each in zip(trials, gradients, strict=True):
        training, _ = counted.run(trial, final=False)
        finished, measured = counted.run(trial, final=True)
        floor = counted.steps(trial) * each * _micro_batches(trial) * least
        tuned.append(max(training / rate, floor))
        last.append(max(finished / rate, floor) + measured / rate)
        more.append((tuning * training + final * (finished + measured), measured / rate))
    seconds = tuning * mean(tuned) + final * mean(last)
    per_example = [counted.passes(trial)[0] * g for trial, g in zip(trials, gradients, strict=True)]
    return MethodCost(
        condition.label,
        method.name,
        tuning,
        final,
        mean(gradients),
        mean(per_example) / 1e9,
        mean(operations for operations, _ in more),
        seconds / 3600,
        final * mean(seconds for _, seconds in more) / seconds if seconds else 0.0,
        counted.memory(method),
        counted.weights(method)[1],
    )


def _micro_batches(method: Method) -> int:
    train = method.train
    return math.ceil(train.batch_size / (train.micro_batch_size or train.batch_size))


def _model_size_notes(condition: Condition) -> list[str]:
    """What a model's size says where the data is not at hand; nothing where the model is not either."""
    try:
        task = tasks.load(condition.task, condition.model)
        if isinstance(getattr(task, "model", None), pretrained.PretrainedModel):
            sketches.configure(task)
        with pretrained.shapes_only():
            model = task.build_model(0)
    except InputError:
        return []
    # a head that is tied to an embedding multiplies, where the embedding looks up
    owners = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = {id(p): p.numel() for m in owners for p in m.parameters(recurse=False) if p.ndim >= 2}
    size = sum(weights.values())
    return [
        f"the model alone: {size:,} weights in matrix products, so about {4 * size / 1e9:.3g} GFLOP a token "
        f"and gradient with an adapter (4·N), {6 * size / 1e9:.3g} without (6·N)"
    ]
