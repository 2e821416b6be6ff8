"""Operations and memory of a condition's runs, counted on its own data or on what is known of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from flatbench import tasks
from flatbench.config.sections import AdapterOptions
from flatbench.errors import FlatbenchError, InputError
from flatbench.estimate import curves, measuring, sketches
from flatbench.estimate import operations as shapes
from flatbench.machine import cache
from flatbench.models import pretrained
from flatbench.models.quiet import quiet
from flatbench.runs import open as opening
from flatbench.store.files import read_json, write_json
from flatbench.study import Condition, Study
from flatbench.study.methods import Method
from flatbench.tasks.base import Task
from flatbench.training.batches import training_batches
from flatbench.training.optimizer import build_optimizer

#: batches of a first epoch on which operations are counted
COUNTED_BATCHES = 4
#: bytes of a weight of a quantised base, its scales included
_QUARTER = 0.56
#: bytes of AdamW's two moments and a gradient, of one trained weight
_TRAINED = 12


Shared = dict[str, Any]


def runs(study: Study, condition: Condition, method: Method) -> tuple[int, int]:
    """Numbers of tuning runs and of final runs."""
    trials, tune = len(condition.trials[method.name]), study.file.tune
    seeds = len(study.file.seeds)
    return (trials * len(tune.seeds), seeds) if tune else (0, trials * seeds)


class Counter(ABC):
    """A condition's task and what has been counted on it.

    Attributes:
        sizes: split -> examples; those of further test sets under names of their own.
        generated: texts that a final run generates, new tokens of each, beams.
        known: whether sizes and lengths are those of the data themselves.
    """

    task: Task
    sizes: Mapping[str, int]
    generated: tuple[int, int, int] = (0, 0, 0)
    known = True

    def __init__(self, study: Study, condition: Condition, shared: Shared) -> None:
        self.study, self.condition, self._memo = study, condition, shared
        self.seed = study.file.seeds[0]
        self.checkpointed = bool(condition.model.get("gradient_checkpointing"))

    @abstractmethod
    def passes(self, method: Method) -> tuple[float, float]:
        """Operations per example of one gradient and of one forward pass, as training batches them."""

    @abstractmethod
    def saved(self, method: Method) -> float:
        """Bytes that a micro-batch keeps for the pass backward."""

    def model(self, options: AdapterOptions) -> nn.Module:
        """The adapted model's shapes."""
        # how an adapter starts changes no shape, and some ways decompose the weights
        plain = options.model_copy(update={"init": True, "init_from": None})
        with pretrained.shapes_only(), quiet():
            return opening.adapted(self.task, self.task.build_model(self.seed), plain).to("meta")

    def gradients_per_step(self, method: Method) -> float:
        """How often a step asks for a gradient, as the method's optimizer itself says."""
        # radii and the like do not change it, and a grid has many of them
        options = {k: v for k, v in method.optimizer.items() if not isinstance(v, float | str) or k == "name"}
        found = self._once(
            [options, method.adapter.model_dump(mode="json")],
            lambda: build_optimizer(self.model(method.adapter), method.optimizer, method.train, 1),
            lambda optimizer: float(optimizer.gradients_per_step),
        )
        return float(found)

    def _once(self, key: Any, make: Callable[[], Any], tell: Callable[[Any], Any]) -> Any:
        """What is told of what is made, which is the same for all conditions of one model and family."""
        where = json.dumps([self.condition.model, type(self.task).__name__, key], default=str)
        if where not in self._memo:
            self._memo[where] = tell(make())
        return self._memo[where]

    def weights(self, method: Method) -> tuple[int, int, int]:
        """Frozen weights, weights that train, and layers."""

        def tell(model: nn.Module) -> tuple[int, int, int]:
            sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
            layers = sum(1 for module in model.modules() if not list(module.children()))
            return sum(n for n, t in sizes if not t), sum(n for n, t in sizes if t), layers

        key = ["weights", method.adapter.model_dump(mode="json")]
        base, trained, layers = self._once(key, lambda: self.model(method.adapter), tell)
        return base, trained, layers

    def epochs(self, method: Method) -> float:
        """Epochs of a run, where it counts steps too."""
        train = method.train
        steps = getattr(train, "steps", None)
        if steps is None:
            return float(train.epochs)
        return float(steps) / math.ceil(self.sizes["train"] / train.batch_size)

    def steps(self, method: Method) -> float:
        """Optimizer steps of a run."""
        return self.epochs(method) * math.ceil(self.sizes["train"] / method.train.batch_size)

    def run(self, method: Method, final: bool) -> tuple[float, float]:
        """Operations of one run: of training with its evaluations, and of measures and generated texts."""
        train, sizes = method.train, self.sizes
        gradient, forward = self.passes(method)
        measured = gradient
        if self.checkpointed:
            gradient += forward  # activations are computed twice
        epochs = self.epochs(method)
        trained = epochs * sizes["train"] * gradient * self.gradients_per_step(method)
        between = (math.ceil(epochs) - 1) // train.evaluate_every if train.evaluate_every else 0
        evaluated = (1 + between) * sizes["validation"]
        if not final:
            return trained + evaluated * forward, 0.0
        evaluated += sum(count for name, count in sizes.items() if name != "validation")
        texts, new, beams = self.generated
        # a text's prompt once, and each new token by itself, in each beam
        written = texts * forward * (1 + beams * new / max(self.tokens(), 1.0))
        return trained + evaluated * forward, written + self.measures(method) * measured

    def measures(self, method: Method) -> float:
        """Gradients of single examples that the measures of a final run cost."""
        epochs, total = self.epochs(method), 0.0
        for measure in self.study.measures.values():
            one = measuring.gradients(measure, self.sizes["train"]) or 0.0
            total += one * measuring.times(measure, epochs)
        return total

    def tokens(self) -> float:
        """Tokens of an example, about."""
        return 1.0

    def memory(self, method: Method) -> float:
        """Peak bytes of training: weights, gradients and moments, activations."""
        base, trained, layers = self.weights(method)
        four, half = self.condition.model.get("quantization"), self.condition.model.get("dtype") == "bfloat16"
        each = _QUARTER if four == "4bit" else 1.06 if four else 2.0 if half else 4.0
        saved = self.saved(method)
        if self.checkpointed:  # of one block at a time, of some ten layers
            saved /= max(layers / 20, 1.0)
        return base * each + trained * (4 + _TRAINED) + saved


def _bf16(condition: Condition, method: Method) -> bool:
    return method.train.precision == "bf16" or condition.model.get("dtype") == "bfloat16"


class Read(Counter):
    """On the data themselves. Raises InputError where they are not at hand, or cannot be counted."""

    def __init__(self, study: Study, condition: Condition, shared: Shared) -> None:
        super().__init__(study, condition, shared)
        self.task = tasks.load(condition.task, condition.model)
        self.splits = self.task.splits(self.seed)
        self.sizes = {name: len(part) for name, part in self.splits.parts().items()}
        self._passes: dict[str, tuple[float, float]] = {}
        for method in condition.methods:
            self.passes(method)
        generation = getattr(self.task, "generation", None)
        if type(self.task).test_metrics is not Task.test_metrics:
            self.generated = self._generation(generation)

    def _generation(self, generation: Any) -> tuple[int, int, int]:
        prompts = getattr(self.splits.test, "prompts", self.splits.test)
        new = getattr(generation, "max_new_tokens", None) or getattr(self.task, "max_new_tokens", 0)
        return len(prompts), int(new or 0), int(getattr(generation, "beams", 1))

    def tokens(self) -> float:
        """Mean tokens of test examples, of the first hundred."""
        found = self.task.lengths([self.splits.test[i] for i in range(min(100, len(self.splits.test)))])
        lengths = list(found or self.task.lengths(self.splits.test) or ())
        return sum(lengths) / len(lengths) if lengths else 1.0

    def _batches(self, method: Method) -> list[dict[str, Any]]:
        sampler = training_batches(self.task, self.splits.train, method.train, self.seed)
        chosen = islice(sampler, COUNTED_BATCHES)
        return [self.task.collate([self.splits.train[i] for i in indices]) for indices in chosen]

    def passes(self, method: Method) -> tuple[float, float]:
        """Operations per example of one gradient and of one forward pass, as training batches them."""
        train = method.train
        key = json.dumps([method.adapter.model_dump(mode="json"), train.batch_size, train.group_by_length])
        if key not in self._passes:
            model = self.model(method.adapter)
            try:
                self._passes[key] = shapes.operations(model, self._batches(method), self.task.loss)
            except Exception as error:  # whatever a model says that needs more than shapes
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"not to be counted from shapes: {type(error).__name__}: {reason}"
                ) from error
        return self._passes[key]

    def saved(self, method: Method) -> float:
        """Bytes that a micro-batch keeps for the pass backward, by the first batch."""
        batch = self._batches(method)[0]
        size = len(next(iter(batch.values())))
        share = min(method.train.micro_batch_size or size, size) / size
        model, bf16 = self.model(method.adapter), _bf16(self.condition, method)
        return curves.count(model, batch, self.task.loss, bf16).saved * share


class Sketched(Counter):
    """On the table of sources. Raises InputError where it knows too little."""

    known = False

    def __init__(self, study: Study, condition: Condition, shared: Shared) -> None:
        super().__init__(study, condition, shared)
        self.task = tasks.load(condition.task, condition.model)
        self.sketch = sketches.sketch(self.task)
        self.sizes, self.generated = self.sketch.sizes, self.sketch.generated
        self.config = self.task.__dict__["_config"]
        self._config_text = self.config.to_json_string(use_diff=False)
        self._means: dict[tuple[Any, ...], curves.Cost] = {}
        for method in condition.methods:
            self._curve(method)

    def tokens(self) -> float:
        """Mean tokens of an example."""
        return self.sketch.lengths[0] if self.sketch.lengths else 1.0

    def _curve(self, method: Method) -> curves.Curve:
        bf16 = _bf16(self.condition, method)
        model = {k: v for k, v in self.condition.model.items() if k != "gradient_checkpointing"}
        adapter = method.adapter.model_copy(update={"init": True, "init_from": None}).model_dump(mode="json")
        shape = [getattr(self.task, "image_size", None), self._config_text]
        key = [_FORMAT, type(self.task).__name__, model, adapter, bf16, shape, *_VERSIONS]
        where = json.dumps(key, sort_keys=True, default=str)
        if where not in self._memo:
            self._memo[where] = _from_cache(where, lambda: self._count(method.adapter, bf16))
        found: curves.Curve = self._memo[where]
        if self.sketch.lengths is not None:
            return found
        # what does not depend on the images: the prompts, of which there are more than were counted
        classes, length = self.sketch.prompts
        copied = min(2.0 * sum(self.weights(method)[:2]) if bf16 else 0.0, found.fixed.saved)
        more = classes * length / math.prod(sketches.PROMPTS)
        fixed = curves.Cost(saved=copied)
        return replace(found, fixed=found.fixed.plus(fixed, -1.0).times(more).plus(fixed))

    def _count(self, adapter: AdapterOptions, bf16: bool) -> curves.Curve:
        def build(config: Any) -> nn.Module:
            self._configure(config)
            return self.model(adapter)

        pictures = "pixel_values" in self.sketch.batch(1, 8)
        try:
            texts = self.sketch.lengths is not None
            return curves.curve(self.config, build, self.sketch.batch, self.task.loss, texts, pictures, bf16)
        finally:
            self._configure(self.config)

    def _configure(self, config: Any) -> None:
        """Let the task build models of a configuration."""
        task: Any = self.task
        task.__dict__["_config"] = config
        for name in ("modules_to_save", "target_modules"):
            task.__dict__.pop(name, None)

    def _costs(self, method: Method, size: int) -> curves.Cost:
        """Of an average batch of so many."""
        train = method.train
        key = (method.adapter.model_dump_json(), _bf16(self.condition, method), size, train.group_by_length)
        if key not in self._means:
            self._means[key] = self._mean(method, size)
        return self._means[key]

    def _mean(self, method: Method, size: int) -> curves.Cost:
        curve = self._curve(method)
        if self.sketch.lengths is None:
            return curve.at(size, 0)
        grouped = method.train.group_by_length
        lengths = sketches.padded_lengths(self.sketch.lengths, self.sketch.longest, size, grouped)
        found = curves.Cost()
        for length in lengths:
            found = found.plus(curve.at(size, length), 1 / len(lengths))
        return found

    def passes(self, method: Method) -> tuple[float, float]:
        """Operations per example of one gradient and of one forward pass, as training batches them."""
        size = min(method.train.batch_size, self.sizes["train"])
        found = self._costs(method, size)
        return found.gradient / size, found.forward / size

    def saved(self, method: Method) -> float:
        """Bytes that the longest micro-batch keeps for the pass backward."""
        train = method.train
        size = min(train.micro_batch_size or train.batch_size, self.sizes["train"])
        curve = self._curve(method)
        if self.sketch.lengths is None:
            return curve.at(size, 0).saved
        longest = sketches.padded_lengths(self.sketch.lengths, self.sketch.longest, 50 * size, False)[-1]
        return curve.at(size, longest).saved


#: raised when curves are counted differently
_FORMAT = 1
_VERSIONS = (torch.__version__, transformers.__version__)


def _from_cache(key: str, make: Callable[[], curves.Curve]) -> curves.Curve:
    """What was counted once, by a hash of all that it depends on; one that is damaged is counted again."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache.folder() / "curves" / f"{name}.json"
    with contextlib.suppress(OSError, FlatbenchError, TypeError, ValueError):
        return curves.Curve(*(curves.Cost(*map(float, part)) for part in read_json(path)))
    found = make()
    with contextlib.suppress(OSError, FlatbenchError):  # a cache that cannot be written costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            path, [list(cost.parts) for cost in (found.fixed, found.example, found.token, found.square)]
        )
    return found


def counter(study: Study, condition: Condition, shared: Shared) -> Counter:
    """The condition's counter: on its data where these and the model are files, else on the table.

    Args:
        shared: what was counted for other conditions.

    Raises InputError where neither will do.
    """
    task = tasks.load(condition.task, condition.model)
    if sketches.unset(task):
        return Sketched(study, condition, shared)
    source = task.source()
    model: Any = getattr(task, "model", None)
    local = not isinstance(model, pretrained.PretrainedModel) or model.folder is not None
    if source is None or (source.wanted is None and local and at_hand(task)):
        return Read(study, condition, shared)
    return Sketched(study, condition, shared)


def at_hand(task: Any) -> bool:
    """Whether files that a task names are there."""
    source = task.source()
    if source is None:
        return True
    if source.wanted is not None:
        return False
    data = getattr(task, "data", None) or task.source_options[1]
    return Path(str(data)).expanduser().is_dir()
