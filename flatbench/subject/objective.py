"""The exact mean training loss at a point and its gradient, summed over batches of any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from flatbench.curvature.eigenpairs.result import MeanLoss
from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators.batches import chosen
from flatbench.curvature.operators.idle import why_unused
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.precision import half_types, why_coarse
from flatbench.errors import FlatbenchError, InputError
from flatbench.subject.spaces import Point
from flatbench.subject.subject import Subject


def rows(batch: Mapping[str, Tensor]) -> int:
    """Number of examples in a batch, see `flatbench.curvature.operators.batches.rows`."""
    return cutting.rows(batch)


def first_examples(
    batches: Sequence[Mapping[str, Tensor]], examples: int | None
) -> list[Mapping[str, Tensor]]:
    """The batches that hold the first ``examples`` examples, the last one cut; all where None or too few.

    Raises InputError if there are no examples at all.
    """
    taken: list[Mapping[str, Tensor]] = []
    left = math.inf if examples is None else examples
    for batch in batches:
        count = rows(batch)
        if left < count:
            count = int(left)
            batch = chosen(batch, slice(0, count))
        if count:
            taken.append(batch)
        left -= count
    if not taken:
        raise InputError("there are no examples to measure on")
    return taken


class Objective:
    """``L(w) = Σ_b n_b · L_b(w) / Σ_b n_b`` over the batches b, with ``n_b`` the terms of a batch's mean.

    A ragged last batch therefore counts for what it holds, and L does not depend on how examples are
    batched.

    Args:
        examples: use only the first that many; None for all.

    Attributes:
        batches: what is used, in its order.
        examples: number of examples in them.
    """

    def __init__(self, subject: Subject, point: Point, examples: int | None) -> None:
        self.batches = first_examples(subject.batches, examples)
        self.examples = sum(map(rows, self.batches))
        self._loss = subject.loss
        self._model = point.model
        self._parameters = list(point.parameters.values())

    def value(self) -> float:
        """L at the weights as they are now. Raises FlatbenchError if it is not finite."""
        with torch.no_grad(), losses_in_float32(self._model):
            found = [self._loss(self._model, batch) for batch in self.batches]
        return self._mean([(float(loss), terms) for loss, terms in found])

    def gradient(self) -> tuple[float, list[Tensor]]:
        """L and its gradient, a tensor per parameter of the space, in float32 at least.

        Raises FlatbenchError if L is not finite or does not depend on any of the parameters.
        """
        seen: list[tuple[float, int]] = []
        # sums of many batches in half precision would lose the small ones
        sums = [torch.zeros_like(p, dtype=_sum_type(p.dtype)) for p in self._parameters]
        used = False
        for batch in self.batches:
            with torch.enable_grad(), losses_in_float32(self._model):
                loss, terms = self._loss(self._model, batch)
            seen.append((float(loss.detach()), terms))
            if terms == 0 or not loss.requires_grad:
                continue
            parts = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:
                    total.add_(part, alpha=terms)
                    used = True
        value = self._mean(seen)
        if not used:
            with torch.enable_grad():
                cause = why_unused(self._model, partial(self._loss, self._model, self.batches[0]))
            raise FlatbenchError(f"the loss depends on no parameter of the space{cause}")
        terms = sum(count for _, count in seen)
        return value, [total / terms for total in sums]

    def _mean(self, seen: Sequence[tuple[float, int]]) -> float:
        """The weighted mean. Raises FlatbenchError if it is not finite."""
        value = weighted_mean(seen)
        if not math.isfinite(value):
            raise FlatbenchError(f"the loss is {value}{why_coarse(half_types(self._model))}")
        return value

    def mean_loss(self) -> MeanLoss:
        """The same L as `flatbench.curvature` takes it; one forward pass tells the batches' terms."""
        with torch.no_grad():
            terms = [self._loss(self._model, batch)[1] for batch in self.batches]
        kept = [(batch, count) for batch, count in zip(self.batches, terms, strict=True) if count]
        losses = [partial(self._batch_loss, batch) for batch, _ in kept]
        return MeanLoss(self._parameters, losses, [count for _, count in kept])

    def _batch_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        with losses_in_float32(self._model):
            return self._loss(self._model, batch)[0]


def _sum_type(kind: torch.dtype) -> torch.dtype:
    return torch.promote_types(kind, torch.float32)


def norm(parts: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors together, accumulated in float64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def weighted_mean(seen: Sequence[tuple[float, int]]) -> float:
    """Mean of batches' mean losses weighted by their terms; a batch without terms counts for nothing.

    Raises FlatbenchError if there are no terms at all.
    """
    total = sum(terms for _, terms in seen)
    if total == 0:
        raise FlatbenchError("the loss is the mean of no terms")
    return sum(loss * terms for loss, terms in seen if terms) / total
