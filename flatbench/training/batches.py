"""Batches of a training set, in an order that an interrupted run can restore."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from flatbench.config.sections import TrainOptions
from flatbench.errors import InputError
from flatbench.seeding import derive_seed
from flatbench.tasks.base import Batch, Example, Task

#: batches whose examples are sorted together; transformers' own number. More would make batches more alike
#: in length and the same from epoch to epoch
POOLED = 50


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices in an order that depends on the seed and the epoch alone.

    So an interrupted run sees after resuming what it would have seen, whatever was drawn before.
    """

    def __init__(self, examples: int, batch_size: int, seed: int) -> None:
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.epoch = 0
        #: batches of the epoch that were made before an interruption
        self.skip = 0

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self.skip :])

    def __len__(self) -> int:
        return math.ceil(self.examples / self.batch_size)

    def _batches(self) -> list[list[int]]:
        """All batches of the epoch."""
        return self._cut_batches(self._order())

    def _order(self) -> list[int]:
        """All indices in the epoch's order."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return torch.randperm(self.examples, generator=generator).tolist()

    def _cut_batches(self, order: Sequence[int]) -> list[list[int]]:
        size = self.batch_size
        return [list(order[start : start + size]) for start in range(0, len(order), size)]


class LengthGroupedBatches(ShuffledBatches):
    """Batches of examples of alike length, so that little of a batch is padding.

    The epoch's shuffled order is cut into pools of 50 batches, each pool is sorted by length and cut into
    batches, and the batches of all pools are shuffled: the longest do not come first or last. Like
    `ShuffledBatches`, every example once an epoch, by seed and epoch alone; only the last batch of the last
    pool may be smaller.

    Args:
        lengths: of each example, in whatever unit a batch is padded in.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        super().__init__(len(lengths), batch_size, seed)
        self.lengths = lengths

    def _batches(self) -> list[list[int]]:
        order, pool = self._order(), POOLED * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            alike = sorted(order[start : start + pool], key=self.lengths.__getitem__, reverse=True)
            batches += self._cut_batches(alike)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "batches", self.epoch))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def training_batches(
    task: Task, examples: Sequence[Example], train: TrainOptions, seed: int
) -> ShuffledBatches:
    """The sampler that ``train`` asks for. Raises InputError where a task's examples have no lengths."""
    if not train.group_by_length:
        return ShuffledBatches(len(examples), train.batch_size, seed)
    check_lengths(task)
    return LengthGroupedBatches(task.lengths(examples) or (), train.batch_size, seed)


def check_lengths(task: Task) -> None:
    """Raise InputError where ``train.group_by_length`` has nothing to group by."""
    if task.lengths(()) is None:
        raise InputError(
            f"train.group_by_length: the examples of {type(task).__name__} have no lengths (all of a batch "
            "are of one size); leave it out"
        )


def micro_batches(batch: Batch, size: int | None) -> list[Batch]:
    """A batch in parts of ``size`` examples, the last of which may be smaller; whole if there is no size."""
    count = len(next(iter(batch.values())))
    if size is None or count <= size:
        return [batch]
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, count, size)]
