"""Losses and other quantities at many points of weight space, by as little forward work as that takes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.errors import InputError
from flatbench.landscape.evaluation import replay, stacked
from flatbench.landscape.evaluation.collect import Collected, LogitsFunction, Values, logits_of
from flatbench.landscape.evaluation.packing import Batch, Packing, packed
from flatbench.landscape.evaluation.weights import Direction, Weights
from flatbench.subject.objective import rows, weighted_mean
from flatbench.subject.spaces import Point
from flatbench.subject.subject import LossFunction

#: largest output of a module, in numbers, that one forward pass shall produce: on a CPU what caches hold and
#: the allocator keeps (larger blocks go back to the system and come again page by page), on a GPU what it
#: needs to be busy. Batches above it are cut, points below it are stacked.
ACTIVATIONS = {"cpu": 2**18, "cuda": 2**26}
#: no more points than this in one pass, and no more bytes of stacked weights
STACK_LIMIT, STACK_BYTES = 64, 2**28
#: bytes of recorded outputs below the first changed layer
PREFIX_BYTES = 2**30
#: what a model raises that does not take a repeated batch or stacked weights
RECOVERABLE = (RuntimeError, ValueError, TypeError, IndexError, KeyError, StopIteration, AttributeError)
#: largest relative difference of a loss that another way of computing it may make
TOLERANCE = 1e-5


@dataclass
class EvaluationPlan:
    """How an evaluator works, and why: what results say about it.

    Attributes:
        stack: points in one forward pass.
        prefix: modules below the first changed layer whose outputs are computed once.
        batches: forward passes that one point takes.
        difference: of a loss among several points in one pass from the same loss alone.
        notes: what was tried and given up, with the reason.
    """

    stack: int = 1
    prefix: int = 0
    batches: int = 0
    difference: float = 0.0
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One sentence."""
        way = f"{self.stack} points in one pass" if self.stack > 1 else "point after point"
        reused = f"{self.prefix} modules below the first changed layer computed once" if self.prefix else ""
        passes = f"{self.batches} batches a point"
        return "; ".join(filter(None, [way, passes, reused, *self.notes]))


@dataclass
class _Part:
    """A batch with what is recorded of it."""

    split: str
    batch: Batch
    prefix: replay.Record


class Evaluator:
    """Quantities at ``w + Σ_i t_i · d_i``, at whatever positions t are asked for.

    A context manager; the model's weights are moved inside only.

    Args:
        point: the model, in one space; its parameters that no direction moves are left alone.
        loss: (model, batch) -> (mean loss, number of terms it is the mean of).
        data: split -> batches.
        axes: the directions d_i, or several sets of them (draws) of one length.
        functions: of all logits of a split and their labels.
        stack: points in one forward pass; chosen by the size of the forward pass if None.
        repack: cut padding and bring the batches to a good size.

    Attributes:
        plan: how the work is done.
        forwards: batches passed through the model so far, a stacked pass counted once.
    """

    def __init__(
        self,
        point: Point,
        loss: LossFunction,
        data: Mapping[str, Sequence[Batch]],
        axes: Sequence[Sequence[Direction]],
        functions: Sequence[LogitsFunction] = (),
        *,
        stack: int | None = None,
        repack: bool = True,
    ) -> None:
        self.point, self.loss, self.functions = point, loss, list(functions)
        self.plan, self.forwards, self.seconds = EvaluationPlan(), 0, 0.0
        self._data = {split: list(batches) for split, batches in data.items()}
        if not any(self._data.values()):
            raise InputError("there are no examples to evaluate")
        moving = [
            i
            for i, _ in enumerate(point.parameters)
            if any(bool(direction[i].any()) for draw in axes for direction in draw)
        ]
        names = list(point.parameters)
        self.weights = Weights({names[i]: point.parameters[names[i]] for i in moving})
        self._axes = [[self.weights.flat([d[i] for i in moving]) for d in draw] for draw in axes]
        self._stack_request, self._repack, self._trust_stack = stack, repack, False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Evaluator:
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(losses_in_float32(self.point.model))
        self._stack.enter_context(self.weights)
        try:
            with self._clock():
                self._prepare()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, split: str) -> list[Batch]:
        """The batches of a split as they are used."""
        return [part.batch for part in self._parts if part.split == split]

    def at(self, draw: int, positions: Sequence[Sequence[float]]) -> Iterator[Values]:
        """The quantities at each position along the draw's directions, in order.

        A loss that is not finite is given as it is. The values at the origin are those of the checkpoint
        itself, computed once.
        """
        left = list(positions)
        while left:
            if not self._trust_stack:
                self._check(draw, [position for position in left if any(position)])
            count = self.plan.stack
            chunk, left = left[:count], left[count:]
            away = [position for position in chunk if any(position)]
            with self._clock():
                found = iter(self._evaluate_points_or_one(draw, away))
            for position in chunk:
                yield next(found) if any(position) else self.origin

    def _check(self, draw: int, away: Sequence[Sequence[float]]) -> None:
        """Before the first points: do the ways to save work give the values of a plain forward pass?"""
        if not away:
            return
        self._trust_stack = True
        with self._clock():
            self._check_prefix(draw, away[0])
            if self.plan.stack > 1:
                self._check_stack(draw, away[: self.plan.stack])

    # -- preparing ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def _prepare(self) -> None:
        """Evaluate the origin, and choose batches, prefix and stacking by what its forward passes show."""
        keep_freed_memory()
        model, changed = self.point.model, {id(p) for p in self.weights.parameters.values()}
        first = next(batch for batches in self._data.values() for batch in batches)
        calls = replay.trace(model, lambda: self.loss(model, first))
        leaves = [call for call in calls if not list(call.module.children())]
        # the last one is the head, whose output may be as wide as a vocabulary
        largest = max((call.elements for call in leaves[:-1] or leaves), default=1)
        limit = ACTIVATIONS.get(first_device(first), ACTIVATIONS["cuda"])
        if self._repack:
            self._pack(first, largest, limit, len(leaves))
        self._parts = [_Part(split, batch, {}) for split, batches in self._data.items() for batch in batches]
        self.plan.batches = len(self._parts)
        self._find_prefix(calls, changed)
        self._tops = replay.without_labels(calls, first)
        self.origin = self._record_origin()
        if self._stack_request is None:
            smallest = limit / largest * rows(first) / max(rows(part.batch) for part in self._parts)
            self.plan.stack = self._affordable(int(smallest))
        else:
            self.plan.stack = max(1, self._stack_request)

    def _affordable(self, points: int) -> int:
        each = sum(p.numel() * p.element_size() for p in self.weights.parameters.values())
        return max(1, min(points, STACK_LIMIT, STACK_BYTES // max(each, 1)))

    def _pack(self, first: Batch, largest: int, limit: int, leaves: int) -> None:
        mask = first.get("attention_mask")
        width = mask.shape[1] if mask is not None and mask.ndim == 2 else 1
        per_token = largest / (rows(first) * width)
        # a call of a leaf costs some microseconds whatever its size; a token costs its multiplications
        weights = sum(p.numel() for p in self.point.model.parameters() if p.ndim >= 2)
        tokens = per_token / max(1, _widest(self.point.model))
        packing = Packing(max(1, int(limit / per_token)), 5e5 * leaves / max(weights, 1) / max(tokens, 1.0))
        loss, model = self.loss, self.point.model
        for split, batches in self._data.items():
            better = packed(batches, packing)
            if all(a is b for a, b in zip(better, batches, strict=False)) and len(better) == len(batches):
                continue
            old, new = (weighted_mean([_pair(loss(model, b)) for b in bs]) for bs in (batches, better))
            if close(new, old):
                self._data[split] = better
            else:
                self.plan.notes.append(f"{split}: batches as given (repacked, the loss is {new}, not {old})")

    def _find_prefix(self, calls: Sequence[replay.Call], changed: set[int]) -> None:
        self._prefix = replay.unreached(calls, changed)
        self.plan.prefix = len(self._prefix)

    def _record_origin(self) -> Values:
        collected = Collected(self.functions)
        held = 0
        for part in self._parts:
            with replay.recorded(self._prefix) as record:
                collected.add(part.split, part.batch, *self._forward(part.batch))
            held += replay.size(record)
            if held > PREFIX_BYTES and self._prefix:
                self.plan.notes.append(f"outputs of {len(self._prefix)} modules too large to keep")
                self._drop_prefix()
            part.prefix = record if self._prefix else {}
        return collected.values()

    def _drop_prefix(self) -> None:
        self._prefix, self.plan.prefix = [], 0
        for part in self._parts:
            part.prefix = {}

    def _check_prefix(self, draw: int, position: Sequence[float]) -> None:
        """Compare one batch with and without the recorded outputs: its losses must be equal."""
        part = self._parts[0]
        if not part.prefix:
            return
        short = float(self._single(part, draw, position)[0])
        plain = float(self._forward(part.batch)[0])
        if short != plain and not (math.isnan(short) and math.isnan(plain)):
            self.plan.notes.append(f"recorded outputs not used: they change the loss from {plain} to {short}")
            self._drop_prefix()

    def _check_stack(self, draw: int, positions: Sequence[Sequence[float]]) -> None:
        """Compare stacked losses of one batch with the same ones alone; where they differ, give it up."""
        part = max(self._parts, key=lambda part: rows(part.batch))
        try:
            together = [float(loss) for loss, _, _ in self._evaluate_stack(part, draw, positions)]
        except RECOVERABLE as error:
            self._give_up_stacking(f"{type(error).__name__}: {error}".partition("\n")[0])
            return
        for position, value in list(zip(positions, together, strict=True))[:: max(1, len(positions) - 1)]:
            alone = float(self._single(part, draw, position)[0])
            if not close(value, alone):
                self._give_up_stacking(f"a stacked loss is {value}, alone it is {alone}")
                return
            self.plan.difference = max(self.plan.difference, abs(value - alone))

    def _give_up_stacking(self, reason: str) -> None:
        self.plan.stack, self.plan.difference = 1, 0.0
        self.plan.notes.append(f"points not stacked ({reason[:200]})")

    # -- evaluating ---------------------------------------------------------------------------------------

    def _forward(self, batch: Batch) -> tuple[Tensor, int, Tensor | None]:
        """Loss, its terms, and the logits if a function wants them."""
        self.forwards += 1
        return self._loss_and_logits(batch)

    def _loss_and_logits(self, batch: Batch) -> tuple[Tensor, int, Tensor | None]:
        if not self.functions:
            return (*self.loss(self.point.model, batch), None)
        seen: list[Any] = []
        handle = self.point.model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            loss, terms = self.loss(self.point.model, batch)
        finally:
            handle.remove()
        return loss, terms, logits_of(seen)

    def _single(self, part: _Part, draw: int, position: Sequence[float]) -> tuple[Tensor, int, Tensor | None]:
        self.weights.move(self._axes[draw], position)
        with replay.played(part.prefix):
            return self._forward(part.batch)

    def _evaluate_points_or_one(self, draw: int, positions: Sequence[Sequence[float]]) -> list[Values]:
        try:
            return self._evaluate_points(draw, positions)
        except RECOVERABLE as error:
            if len(positions) == 1:
                raise
            self._give_up_stacking(f"{type(error).__name__}: {error}".partition("\n")[0])
            return [self._evaluate_points(draw, [position])[0] for position in positions]

    def _evaluate_points(self, draw: int, positions: Sequence[Sequence[float]]) -> list[Values]:
        if not positions:
            return []
        collected = [Collected(self.functions) for _ in positions]
        if len(positions) == 1:
            self.weights.move(self._axes[draw], positions[0])
            for part in self._parts:
                with replay.played(part.prefix):
                    collected[0].add(part.split, part.batch, *self._forward(part.batch))
        else:
            weights = self.weights.stack(self._axes[draw], positions)
            for part in self._parts:
                found = self._evaluate_stack(part, draw, positions, weights)
                for target, (loss, terms, logits) in zip(collected, found, strict=True):
                    target.add(part.split, part.batch, loss, terms, logits)
        return [target.values() for target in collected]

    def _evaluate_stack(
        self,
        part: _Part,
        draw: int,
        positions: Sequence[Sequence[float]],
        weights: Mapping[int, Tensor] | None = None,
    ) -> list[tuple[Tensor, int, Tensor | None]]:
        """The model's body once for all points; its loss, which is a mean over a batch, point by point."""
        points, count = len(positions), rows(part.batch)
        weights = self.weights.stack(self._axes[draw], positions) if weights is None else weights
        long = stacked.repeated(dict(part.batch), count, points)
        prefix = {module: stacked.repeated(outputs, count, points) for module, outputs in part.prefix.items()}
        with (
            stacked.stacked(self.point.model, weights, points, count),
            replay.played(prefix),
            replay.recorded(self._tops) as record,
        ):
            self.forwards += 1
            self.loss(self.point.model, long)
        found = []
        for i in range(points):
            mine = {module: stacked.at_point(outs, i, count, points) for module, outs in record.items()}
            with replay.played(mine):
                found.append(self._loss_and_logits(part.batch))
        return found


def close(left: float, right: float) -> bool:
    """Whether two ways of computing a loss agree; two that are not finite do."""
    if not (math.isfinite(left) and math.isfinite(right)):
        return math.isfinite(left) == math.isfinite(right)
    return abs(left - right) <= TOLERANCE * max(abs(left), abs(right)) + 1e-12


def keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 31 MiB that are freed, instead of giving their pages back to the system.

    Its thresholds follow the largest block freed so far. Until a large one was, activations of every forward
    pass are page-faulted in anew, which costs about a tenth of the time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # and freed at once


def first_device(batch: Batch) -> str:
    """The kind of device that a batch is on."""
    return next(value.device.type for value in batch.values())


def _pair(found: tuple[Tensor, int]) -> tuple[float, int]:
    return float(found[0]), found[1]


def _widest(model: nn.Module) -> int:
    return max((max(p.shape) for p in model.parameters() if p.ndim == 2), default=1)
