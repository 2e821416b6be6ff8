"""Curvature over batches that several processes share: each multiplies with its own, products are averaged.

The first process computes, a search or an estimate, and the others serve its products until it is done, so
that no rounding makes two searches part ways. Their operators hold the same weights and batches of their own;
what comes out is that of all batches in one operator, but for rounding.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.fingerprint import fingerprint
from flatbench.curvature.operators.loss_operator import LossOperator
from flatbench.curvature.operators.pieces import sample_of
from flatbench.errors import FlatbenchError, InputError

T = TypeVar("T")


def over_processes(
    operator: LossOperator, compute: Callable[[SymmetricOperator], T], group: Any | None = None
) -> T:
    """What ``compute`` finds of the curvature over the batches of all processes, in every one of them.

    Call it in each process of a group that `torch.distributed` has formed, as torchrun starts them::

        torch.distributed.init_process_group("gloo")
        own = batches[torch.distributed.get_rank() :: torch.distributed.get_world_size()]
        operator = HessianOperator(model, loss, own)
        found = over_processes(operator, lambda whole: top_eigenpairs(whole, k=5))

    ``H = Σ_p n_p·H_p / Σ_p n_p`` with n_p the terms of the p-th process's batches, however unequal they are.
    Without a group, or with one of a single process, it is ``compute(operator)``.

    Args:
        operator: over this process's batches, the same model, loss, space and precision in each.
        compute: called in the first process of the group alone, with an operator over all batches; what it
            returns is sent to the others, so it must be picklable.
        group: of processes; all if None.

    Raises:
        InputError: the processes' operators are of other weights, parameters or kinds, or their losses of the
            first process's first rows differ; a loss that does not tell its terms is not the mean over its
            rows.
        Exception: what was raised in the first process, in every one of them; what was raised in another, as
            an error of its kind that names the process.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return compute(operator)
    if distributed.get_rank(group) < 0:
        raise InputError("over_processes: this process does not belong to the group")
    if distributed.get_world_size(group) == 1:
        return compute(operator)
    channel = _Channel(group)
    channel.check_alike(operator)
    operator.is_part = True  # a loss without its terms is looked at more closely
    try:
        return _lead(operator, channel, compute) if channel.first else _serve(operator, channel)
    finally:
        operator.is_part = False


@dataclass(frozen=True)
class _Answer:
    """What a process says to a command: a value, or what was raised."""

    value: Any = None
    error: Exception | None = None


class _Channel:
    """What the processes of a group tell each other."""

    def __init__(self, group: Any | None) -> None:
        self.group = group
        self.rank, self.size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        self._source = 0 if group is None else torch.distributed.get_global_rank(group, 0)

    @property
    def first(self) -> bool:
        """Whether this is the process that computes."""
        return self.rank == 0

    def said(self, *command: Any) -> tuple[Any, ...]:
        """What the first process says; its own words there."""
        box: list[Any] = [command]
        torch.distributed.broadcast_object_list(box, src=self._source, group=self.group)
        found: tuple[Any, ...] = box[0]
        return found

    def answers(self, make: Callable[[], Any]) -> list[Any]:
        """What every process makes, by rank. Raises what was raised in one of them, in all."""
        try:
            own = _Answer(make())
        except Exception as error:
            own = _Answer(error=error)
        found: list[_Answer] = [_Answer()] * self.size
        torch.distributed.all_gather_object(found, _sendable(own), group=self.group)
        if own.error is not None:
            raise own.error
        for rank, answer in enumerate(found):
            if answer.error is not None:
                kind = type(answer.error) if isinstance(answer.error, FlatbenchError) else FlatbenchError
                raise kind(f"process {rank}: {answer.error}")
        return [answer.value for answer in found]

    def sent(self, tensor: Tensor) -> Tensor:
        """The first process's tensor."""
        torch.distributed.broadcast(tensor, src=self._source, group=self.group)
        return tensor

    def mean(self, tensor: Tensor, weight: float, weights: Sequence[float]) -> Tensor:
        """The weighted mean of the processes' tensors."""
        total = tensor * weight
        torch.distributed.all_reduce(total, group=self.group)
        return total.div_(sum(weights))

    def check_alike(self, operator: LossOperator) -> None:
        """Raise InputError where the processes' operators cannot be of one model."""

        def digest() -> dict[str, Any]:
            checksums = sorted(fingerprint(operator.model).checksums.items())
            if operator.is_open:
                raise InputError("over_processes: call it outside of 'with operator:'")
            return {
                "weights": hashlib.sha256(repr(checksums).encode()).hexdigest(),
                "parameters in the space": [(name, tuple(shape)) for name, shape in operator.shapes.items()],
                "kind of curvature": type(operator).__name__,
                "precision": (operator.precision, str(operator.dtype)),
            }

        found: list[dict[str, Any]] = self.answers(digest)
        for rank, other in enumerate(found):
            differing = [what for what, value in other.items() if value != found[0][what]]
            if differing:
                raise InputError(
                    f"over_processes: process {rank} has other {' and '.join(differing)} than process 0; "
                    "each needs the same model, loss and options, with batches of its own"
                )


def _sendable(answer: _Answer) -> _Answer:
    """The answer, with an error that can be sent."""
    if answer.error is None or isinstance(answer.error, FlatbenchError):
        return answer
    return _Answer(error=FlatbenchError(f"{type(answer.error).__name__}: {answer.error}"))


def _lead(operator: LossOperator, channel: _Channel, compute: Callable[[SymmetricOperator], T]) -> T:
    """Compute, and tell the others what was found or what went wrong."""
    try:
        with contextlib.ExitStack() as stack:
            whole, before = _Shared(operator, channel, stack), operator.products
            found = compute(whole)
        if operator.products - before != whole.products:
            raise InputError(
                "over_processes: compute multiplied with this process's own operator, which knows its own "
                "batches alone; it is to use the operator that it is given"
            )
    except BaseException as error:
        told = error if isinstance(error, FlatbenchError) else None
        channel.said("end", told or FlatbenchError(f"process 0: {type(error).__name__}: {error}"), None)
        raise
    try:
        channel.said("end", None, found)
    except Exception as error:  # what cannot be pickled raises many kinds, before anything is sent
        refusal = InputError(f"over_processes: what compute returned cannot be sent: {error}")
        channel.said("end", refusal, None)
        raise refusal from None
    return found


def _serve(operator: LossOperator, channel: _Channel) -> Any:
    """Do what the first process asks for, until it has ended."""
    with contextlib.ExitStack() as stack:
        part = _Part(operator, channel, stack)
        while True:
            command, *given = channel.said()
            if command == "end":
                error, found = given
                if error is not None:
                    raise error
                return found
            with contextlib.suppress(Exception):  # told to the first, which decides what becomes of it
                getattr(part, command)(*given)


class _Part:
    """A process's part in each of the commands; the same calls in the same order in all of them."""

    def __init__(self, operator: LossOperator, channel: _Channel, stack: contextlib.ExitStack) -> None:
        self.operator, self.channel, self.stack = operator, channel, stack

    def open(self, rows: Any) -> list[Any]:
        """Open the operator; what each says of it, and its loss of the same rows."""

        def opened() -> tuple[str, float, float]:
            self.stack.enter_context(self.operator)
            return self.operator.coarse, self.operator.relative_error, self.operator.loss_of(rows)

        return self.channel.answers(opened)

    def close(self) -> None:
        """Close the operator."""
        self.channel.answers(self.stack.close)

    def reserved(self) -> list[Any]:
        """Bytes that each operator holds."""
        return self.channel.answers(self.operator.reserved_memory)

    def together(self) -> list[Any]:
        """How many vectors each takes at a time."""
        return self.channel.answers(lambda: self.operator.plan.together)

    def point(self) -> tuple[float, Tensor]:
        """The loss over all batches, and its gradient."""
        told = self.channel.answers(lambda: (self.operator.point()[0], self.operator.terms))
        gradient = self.operator.point()[1]
        terms = [terms for _, terms in told]
        if not sum(terms):
            raise FlatbenchError("the loss is the mean of no terms")
        mean = sum(value * terms for value, terms in told) / sum(terms)
        return mean, self.channel.mean(gradient, self.operator.terms, terms)

    def products(self, count: int, vectors: Tensor | None = None) -> tuple[list[Tensor], list[float]]:
        """Products with the first process's vectors ``(count, n)``, and the relative error of each part."""
        operator = self.operator
        if vectors is None:
            vectors = torch.zeros(count, operator.dimension, dtype=operator.dtype, device=operator.device)
        shared = self.channel.sent(vectors)
        own: list[Tensor] = []

        def multiplied() -> tuple[int, float]:
            own.append((operator @ shared.T).T)
            return operator.terms, operator.relative_error

        told = self.channel.answers(multiplied)
        found = self.channel.mean(own[0], operator.terms, [terms for terms, _ in told])
        return list(found), [error for _, error in told]


class _Shared(SymmetricOperator):
    """The curvature over all processes' batches, in the first of them."""

    def __init__(self, operator: LossOperator, channel: _Channel, stack: contextlib.ExitStack) -> None:
        self.dimension, self.dtype, self.device = operator.dimension, operator.dtype, operator.device
        self.memory, self.shapes, self._operator = operator.memory, operator.shapes, operator
        self._channel, self._part = channel, _Part(operator, channel, stack)

    def _ask(self, command: str, *given: Any) -> None:
        self._channel.said(command, *given)

    def _open(self) -> None:
        rows = cutting.to_device(sample_of(self._operator.batches[0]), torch.device("cpu"))
        self._ask("open", rows)
        told = self._part.open(rows)
        self.coarse = next((coarse for coarse, _, _ in told if coarse), "")
        self.relative_error = max(error for _, error, _ in told)
        for rank, (_, _, loss) in enumerate(told):
            own = told[0][2]
            near = math.isclose(loss, own, rel_tol=1e-4 + self.relative_error, abs_tol=1e-6)
            if not near and not (math.isnan(loss) and math.isnan(own)):
                raise InputError(
                    f"over_processes: process {rank} has another loss: {loss:.6g} of rows of which process 0 "
                    f"has {own:.6g}; each needs the same model, loss and options"
                )

    def _close(self) -> None:
        self._ask("close")
        self._part.close()

    def reserved_memory(self) -> int:
        """Bytes that the process needs most of."""
        with self:
            self._ask("reserved")
            return int(max(self._part.reserved()))

    def reserve(self, needed: int) -> None:
        """Leave so many bytes of the first process's memory, which holds the vectors of a search."""
        self._operator.reserve(needed)

    def memory_beside(self, needed: int) -> int:
        """A memory that holds so many bytes beside the first process's operator."""
        return self._operator.memory_beside(needed)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """A vector ``(n,)`` in the shapes of the parameters."""
        return self._operator.split(vector)

    def point(self) -> tuple[float, Tensor]:
        """The loss over all batches, and its gradient ``(n,)``."""
        with self:
            self._ask("point")
            return self._part.point()

    def _together(self) -> int:
        self._ask("together")
        return int(min(self._part.together()))

    def _product(self, vector: Tensor) -> Tensor:
        return self._several([vector])[0]

    def _several(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        self._ask("products", len(vectors))
        found, errors = self._part.products(len(vectors), torch.stack(list(vectors)))
        self.relative_error = max(errors)
        return found
