"""Interface of task families to the runner and the measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.losses import losses_in_float32

Batch = Mapping[str, Tensor]
Example = Mapping[str, Any]


@dataclass(frozen=True)
class Splits:
    """The three parts of a task's data, each a sequence of examples that `Task.collate` makes batches of.

    Tuning reads `train` and `validation`; only a final run may read `test` and `more_tests`, further test
    sets by name, each evaluated like `test` (MNLI's mismatched set).
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    more_tests: Mapping[str, Sequence[Example]] = field(default_factory=dict)

    def parts(self) -> dict[str, Sequence[Example]]:
        """All splits by name, further test sets under names of their own."""
        return {"train": self.train, "validation": self.validation, "test": self.test, **self.more_tests}


class Task(ABC):
    """A problem to fine-tune on: data, model, loss and metrics.

    The keyword-only arguments of a task's constructor are its options in a study file; the argument
    named ``model`` takes the study's ``model:`` section. A constructor checks what can be known without
    loading data or weights and raises InputError.
    """

    #: name, among the keys of `evaluate` or `test_metrics`, of the figure that tables show; larger is better
    metric: str
    #: validation metric that chooses hyper-parameters where `metric` is known for test sets only
    tuning_metric: str | None = None
    #: names (peft's ``target_modules``) of the modules that an adapter treats unless the study says else;
    #: a property of a task on any model raises InputError where it knows none
    target_modules: Sequence[str]
    #: modules trained in full beside the adapter because they start from random weights
    modules_to_save: Sequence[str] = ()

    @property
    def validation_metrics(self) -> Sequence[str]:
        """Metrics of `evaluate` on validation data by which a study may choose, beside ``loss``."""
        return (self.tuning_metric or self.metric,)

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of the data as it is now; it becomes a part of every run's identity.

        Raises InputError when the data is missing or cannot be used.
        """

    @abstractmethod
    def splits(self, seed: int) -> Splits:
        """The data. What is random per run (label noise) is drawn from streams of ``seed``; which example
        lies in which split is not, unless the study asks for few shots drawn by the run's seed."""

    @abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """The pretrained model, not yet adapted; new weights come from the "initialisation" stream."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """One batch, as keyword arguments of the model."""

    @abstractmethod
    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """The task's metrics from logits ``(N, classes)`` and labels ``(N,)``."""

    def lengths(self, examples: Sequence[Example]) -> Sequence[int] | None:
        """Length of each example of a split, in what `collate` pads; None where all are of one size."""
        return None

    def training_examples(self, examples: Sequence[Example], seed: int) -> Sequence[Example]:
        """The train split as training sees it: measures and evaluation see `splits`' own.

        What has an attribute ``epoch`` is told before each epoch which one begins; everything random in it
        must depend on ``seed``, the epoch and the example alone.
        """
        return examples

    def shortages(self) -> Mapping[str, Mapping[str, int]]:
        """Split -> class -> examples, of the classes that have fewer than the shots asked for.

        Known with the data, so that it is said before anything is trained; `describe` has it as
        ``fewer_than_shots``.
        """
        return {}

    def source(self) -> Any:
        """A `flatbench.tasks.common.hub.Source`: where the data come from, told by the options alone.

        None for a task that cannot tell. Raises InputError for options that lead nowhere.
        """
        return None

    def overview(self) -> dict[str, Any]:
        """The part of `describe` for which nothing need be prepared: ``examples`` of each split, ``classes``,
        and examples that are in two splits. `flatbench show` says what is wrong with it."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What to record about the data beside a run's results: sizes, texts cut short; JSON-able."""
        return self.overview()

    def test_metrics(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """Further metrics of a test set that `splits` gave, too costly for every split (generated texts)."""
        return {}

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss over the `terms` of a batch, 0-dimensional, and logits ``(N, classes)``."""
        found = model(**batch)
        return found.loss, found.logits

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the `terms` of a batch, 0-dimensional, in float32 at least."""
        with losses_in_float32(model):
            return self.outputs(model, batch)[0]

    def terms(self, batch: Batch) -> int:
        """How many terms the loss of a batch is the mean of: examples, unless a task counts tokens."""
        return len(batch["labels"])  # no label of an example is left out; to count would wait for the device

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss and metrics over batches, in evaluation mode; the mode is put back afterwards."""
        was_training = model.training
        model.eval()
        total, count = 0.0, 0
        logits, labels = [], []
        try:
            with torch.no_grad(), losses_in_float32(model):
                for batch in batches:
                    loss, found = self.outputs(model, batch)
                    size = self.terms(batch)
                    total += float(loss) * size
                    count += size
                    logits.append(found.float().cpu())
                    labels.append(batch["labels"].cpu())
        finally:
            model.train(was_training)
        return {"loss": total / count, **self.metrics(torch.cat(logits), torch.cat(labels))}
