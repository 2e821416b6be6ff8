"""Estimate a study's GPU hours from counted operations, before any of it is run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import mean

from torch import nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.errors import InputError
from flatbench.estimate import operations as shapes
from flatbench.estimate.gpus import GPU
from flatbench.models import pretrained
from flatbench.models.quiet import quiet
from flatbench.runs import open as opening
from flatbench.study import Condition, Study
from flatbench.study.methods import Method
from flatbench.tasks.base import Task
from flatbench.training.batches import training_batches
from flatbench.training.optimizer import build_optimizer

#: batches of a first epoch on which operations are counted
COUNTED_BATCHES = 4
#: share of the peak that training is assumed to reach (model FLOPs utilisation)
UTILISATION = 0.3


@dataclass(frozen=True)
class MethodCost:
    """One method in one condition.

    Attributes:
        gflops_per_example: what the measure ``cost`` calls so: 10⁹ operations of a step for one example, on
            average over the method's trials; None where model or data are not at hand.
        operations: of all tuning and final runs, evaluation after training included; None as above.
        hours: on the estimate's GPU; None as above.
    """

    condition: str
    method: str
    tuning_runs: int
    final_runs: int
    gradients_per_step: float | None
    gflops_per_example: float | None
    operations: float | None
    hours: float | None


@dataclass(frozen=True)
class Estimate:
    """A study's cost on one GPU.

    Attributes:
        utilisation: share of the peak that was assumed.
        unknown: what could not be found out, and why.
        excluded: what the study does beside, and is not counted.
    """

    study: str
    gpu: GPU
    utilisation: float
    costs: Sequence[MethodCost]
    unknown: Sequence[str]
    excluded: Sequence[str]

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

    ``hours = Σ operations / (peak · utilisation) / 3600``. The operations of a run are those of its epochs'
    gradients, counted on the shapes of the first batches that it would train on, and of the forward passes of
    its evaluations. Weights are not read, so a model on the hub costs the download of its configuration.

    Raises InputError for a utilisation outside (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise InputError(f"--mfu: {utilisation} is no share of the peak; give one above 0 and up to 1")
    costs: list[MethodCost] = []
    unknown: list[str] = []
    excluded: list[str] = [f"the measure {name}" for name in study.measures if name != "cost"]
    for condition in study.conditions:
        try:
            counted = _OperationCounter(condition, study.file.seeds[0])
        except InputError as error:
            label = f"{condition.label}: " if condition.label else ""
            unknown.append(f"{label}operations and examples: {error}")
            unknown += [f"{label}{line}" for line in _model_size_notes(condition)]
            costs += [_cost_without_operations(study, condition, method) for method in condition.methods]
            continue
        costs += [_cost(study, condition, method, counted, on, utilisation) for method in condition.methods]
        if type(counted.task).test_metrics is not Task.test_metrics:
            excluded.append("metrics of the test split that need more (generated texts)")
    return Estimate(study.name, on, utilisation, costs, unknown, list(dict.fromkeys(excluded)))


def _runs(study: Study, condition: Condition, method: Method) -> tuple[int, int]:
    """Tuning runs and final runs."""
    trials, tune = len(condition.trials[method.name]), study.file.tune
    seeds = len(study.file.seeds)
    return (trials * len(tune.seeds), seeds) if tune else (0, trials * seeds)


def _cost_without_operations(study: Study, condition: Condition, method: Method) -> MethodCost:
    return MethodCost(condition.label, method.name, *_runs(study, condition, method), None, None, None, None)


def _cost(
    study: Study,
    condition: Condition,
    method: Method,
    counted: _OperationCounter,
    on: GPU,
    utilisation: float,
) -> MethodCost:
    tuning, final = _runs(study, condition, method)
    trials = [condition.configured(method, choice) for choice in condition.trials[method.name]]
    # which trial is chosen is not known yet: a final run costs what they cost on average
    tuned = mean(counted.run(trial, final=False) for trial in trials)
    last = mean(counted.run(trial, final=True) for trial in trials)
    operations = tuning * tuned + final * last
    half = condition.model.get("dtype") == "bfloat16" or condition.model.get("quantization")
    bf16 = method.train.precision == "bf16" or half
    rate = on.peak("bf16" if bf16 else "fp32") * utilisation
    gradients = [counted.gradients_per_step(trial) for trial in trials]
    per_example = [counted.passes(trial)[0] * g for trial, g in zip(trials, gradients, strict=True)]
    return MethodCost(
        condition.label,
        method.name,
        tuning,
        final,
        mean(gradients),
        mean(per_example) / 1e9,
        operations,
        operations / rate / 3600,
    )


class _OperationCounter:
    """A condition's task and what has been counted on it. Raises InputError where it is not at hand."""

    def __init__(self, condition: Condition, seed: int) -> None:
        self.seed = seed
        self.task = tasks.load(condition.task, condition.model)
        self.splits = self.task.splits(seed)
        self.checkpointed = bool(condition.model.get("gradient_checkpointing"))
        self._passes: dict[str, tuple[float, float]] = {}
        self._gradients: dict[str, float] = {}
        for method in condition.methods:
            self.passes(method)

    def _model(self, options: AdapterOptions) -> nn.Module:
        # how an adapter starts changes no shape, and some ways decompose the weights
        plain = options.model_copy(update={"init": True})
        with pretrained.shapes_only(), quiet():
            return opening.adapted(self.task, self.task.build_model(self.seed), plain).to("meta")

    def passes(self, method: Method) -> tuple[float, float]:
        """Operations per example of one gradient and of one forward pass, as training batches them."""
        adapter, train = method.adapter, method.train
        key = json.dumps([adapter.model_dump(mode="json"), train.batch_size, train.group_by_length])
        if key not in self._passes:
            sampler = training_batches(self.task, self.splits.train, train, self.seed)
            chosen = islice(sampler, COUNTED_BATCHES)
            batches = [self.task.collate([self.splits.train[i] for i in indices]) for indices in chosen]
            model = self._model(adapter)
            try:
                self._passes[key] = shapes.operations(model, batches, self.task.loss)
            except Exception as error:  # whatever a model says that needs more than shapes
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"not to be counted from shapes: {type(error).__name__}: {reason}"
                ) from error
        return self._passes[key]

    def gradients_per_step(self, method: Method) -> float:
        """How often a step asks for a gradient, as the method's optimizer itself says."""
        # radii and the like do not change it, and a grid has many of them
        options = {k: v for k, v in method.optimizer.items() if not isinstance(v, float)}
        key = json.dumps([options, method.adapter.model_dump(mode="json")])
        if key not in self._gradients:
            optimizer = build_optimizer(self._model(method.adapter), method.optimizer, method.train, 1)
            self._gradients[key] = float(optimizer.gradients_per_step)
        return self._gradients[key]

    def run(self, method: Method, final: bool) -> float:
        """Operations of one run."""
        train, splits = method.train, self.splits
        gradient, forward = self.passes(method)
        if self.checkpointed:
            gradient += forward  # activations are computed twice
        size = len(splits.train)
        epochs = train.epochs if train.steps is None else train.steps / math.ceil(size / train.batch_size)
        trained = epochs * size * gradient * self.gradients_per_step(method)
        between = (math.ceil(epochs) - 1) // train.evaluate_every if train.evaluate_every else 0
        evaluated = len(splits.train) + (1 + between) * len(splits.validation)
        if final:
            evaluated += sum(map(len, (splits.test, *splits.more_tests.values())))
        return trained + evaluated * forward


def _model_size_notes(condition: Condition) -> list[str]:
    """What a model's size says where the data is not at hand; nothing where the model is not either."""
    try:
        task = tasks.load(condition.task, condition.model)
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
