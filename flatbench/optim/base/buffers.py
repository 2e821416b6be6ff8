"""Parameters laid end to end, so that what a method computes on all of them is a few operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from flatbench import sums
from flatbench.distributed.shard import Shard
from flatbench.sums import is_long


class Buffers:
    """The layout of parameters in flat buffers, one for each device and type.

    Args:
        parameters: dense tensors of any shapes; where they lie is looked at once. They are all a `Shard`, or
            none is; the processes then have to ask for the same norms.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._has_shards = any(isinstance(p, Shard) for p in self.parameters)
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, parameter in enumerate(self.parameters):
            kinds.setdefault((parameter.device, parameter.dtype), []).append(i)
        self._kinds = list(kinds.values())
        self._like = [[self.parameters[i] for i in indices] for indices in self._kinds]
        self._signature = self._layout_key(self.parameters)
        self._sizes: list[Tensor] | None = None
        self._order: tuple[list[Tensor], Tensor] | None = None

    @staticmethod
    def _layout_key(parameters: Sequence[Tensor]) -> list[tuple[int, torch.device, torch.dtype]]:
        return [(id(p), p.device, p.dtype) for p in parameters]

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Whether these are the parameters laid out here, where they were then."""
        return self._layout_key(parameters) == self._signature

    def flatten(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """One flat copy for each kind; None counts as zeros."""
        found = []
        for indices, like in zip(self._kinds, self._like, strict=True):
            filled = [
                torch.zeros_like(p) if (t := tensors[i]) is None else t.to(p.dtype)
                for i, p in zip(indices, like, strict=True)
            ]
            # of a single tensor, torch would make a view
            found.append(_flatten_dense_tensors(filled) if len(filled) > 1 else filled[0].clone().flatten())
        return found

    def unflatten(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views in the shapes and the order of the parameters."""
        found: list[Tensor] = [torch.empty(0)] * len(self.parameters) if len(self._kinds) > 1 else []
        for indices, like, buffer in zip(self._kinds, self._like, buffers, strict=True):
            views = _unflatten_dense_tensors(buffer, like)
            if len(self._kinds) == 1:
                return list(views)
            for i, view in zip(indices, views, strict=True):
                found[i] = view
        return found

    def gradients(self) -> list[Tensor]:
        """The gradients; a missing one counts as zero."""
        return self.flatten([p.grad for p in self.parameters])

    def weights(self) -> list[Tensor]:
        """A copy of the parameters."""
        return self.flatten(self.parameters)

    def put_gradients(self, buffers: Sequence[Tensor]) -> None:
        """Write ``buffers`` into the gradients that are there."""
        pairs = [
            (p.grad, v)
            for p, v in zip(self.parameters, self.unflatten(buffers), strict=True)
            if p.grad is not None
        ]
        if pairs:
            torch._foreach_copy_([grad for grad, _ in pairs], [value for _, value in pairs])

    def copy_(self, buffers: Sequence[Tensor]) -> None:
        """Set the parameters to ``buffers``."""
        torch._foreach_copy_(self.parameters, self.unflatten(buffers))

    def norms(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The norm of each tensor in ``buffers``, a vector for each kind."""
        found = []
        for buffer, like in zip(buffers, self._like, strict=True):
            views = _unflatten_dense_tensors(_widen(buffer), like)
            lengths = torch.stack(
                [sums.norm(v) for v in views] if is_long(buffer) else list(torch._foreach_norm(views))
            )
            found.append(_over_parts(lengths.square()).sqrt() if self._has_shards else lengths)
        return found

    def norm(self, buffers: Sequence[Tensor]) -> Tensor:
        """`norm` of ``buffers``, over all parts of the parameters."""
        return _over_parts(norm(buffers).square()).sqrt() if self._has_shards else norm(buffers)

    def inner(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """`inner` of the buffers, over all parts of the parameters."""
        found = inner(first, second)
        return _over_parts(found) if self._has_shards else found

    def in_order(self, values: Sequence[Tensor]) -> Tensor:
        """A vector of one number a tensor for each kind, as one vector in the parameters' order."""
        if len(values) == 1:
            return values[0]
        home = values[0].device
        return torch.cat([v.to(home) for v in values])[self._permutations()[1].to(home)]

    def by_kind(self, values: Tensor) -> list[Tensor]:
        """One number a parameter, ``(parameters,)``, as a vector for each kind on its device."""
        if len(self._kinds) == 1:
            return [values]
        indices = self._permutations()[0]
        return [
            values[i.to(values.device)].to(like[0].device)
            for i, like in zip(indices, self._like, strict=True)
        ]

    def _permutations(self) -> tuple[list[Tensor], Tensor]:
        if self._order is None:
            kinds = [torch.tensor(indices) for indices in self._kinds]
            self._order = kinds, torch.argsort(torch.cat(kinds))
        return self._order

    def spread(self, values: Sequence[Tensor]) -> list[Tensor]:
        """A vector of one number a tensor for each kind, as buffers that repeat each number."""
        if self._sizes is None:
            self._sizes = [
                torch.tensor([p.numel() for p in like], device=like[0].device) for like in self._like
            ]
        totals = [sum(p.numel() for p in like) for like in self._like]
        return [
            torch.repeat_interleave(value, sizes, output_size=total)
            for value, sizes, total in zip(values, self._sizes, totals, strict=True)
        ]


def _widen(buffer: Tensor) -> Tensor:
    """At least float32, in which squares of half-precision gradients do not underflow."""
    return buffer.to(torch.promote_types(buffer.dtype, torch.float32))


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """The norm of everything from the norms of its parts, 0-dimensional, on the first one's device."""
    if not norms:
        return torch.zeros(())
    if len(norms) == 1 and norms[0].ndim == 0:
        return norms[0]
    home = norms[0].device
    widest = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    flat = [n.to(device=home, dtype=widest).reshape(-1) for n in norms]
    whole: Tensor = torch.linalg.vector_norm(torch.cat(flat))
    return whole


def norm(buffers: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all buffers, in float32 at least, 0-dimensional."""
    return total_norm([sums.norm(b) for b in buffers if b.numel()])


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Inner product over all buffers, in float32 at least, 0-dimensional."""
    found = torch.zeros(())
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        part = sums.inner(_widen(a), _widen(b))
        found = part if i == 0 else found + part.to(found.device)
    return found


def _over_parts(values: Tensor) -> Tensor:
    """Numbers added up over all processes."""
    total = values.double()
    torch.distributed.all_reduce(total)
    return total.to(values.dtype)


def usable(length: Tensor) -> Tensor:
    """Whether a norm is that of a gradient that says something: finite and not zero."""
    return torch.isfinite(length) & (length > 0)


@dataclass(frozen=True)
class Move:
    """What a perturbation adds to weights.

    Attributes:
        layout: the weights that move.
        values: what is added to each, in the layout's order.
        norm: the perturbation's norm, 0-dimensional.
        skipped: whether there was no usable gradient, 0-dimensional bool; then every value is zero.
    """

    layout: Buffers
    values: list[Tensor]
    norm: Tensor
    skipped: Tensor


def scaled(
    layout: Buffers,
    direction: Sequence[Tensor],
    rho: float,
    per_tensor: bool = False,
    measured_by: Sequence[Tensor] | None = None,
) -> Move:
    """``rho · direction / ‖measured_by‖``; nothing where that norm is zero or not finite.

    Nothing here waits for the device: a useless gradient gives zeros, not another way through the code.

    Args:
        direction: buffers of ``layout``.
        per_tensor: rho holds for each tensor alone, not for all together.
        measured_by: what the norm is taken of; ``direction`` if not given.
    """
    measure = direction if measured_by is None else measured_by
    if per_tensor:
        lengths = layout.norms(measure)
        scales = [torch.where(usable(length), rho / length, 0.0) for length in lengths]
        length = total_norm(lengths)
        factors: Sequence[Tensor] = layout.spread(scales)
    else:
        length = layout.norm(measure)
        scale = torch.where(usable(length), rho / length, 0.0)
        factors = [scale.to(buffer.device) for buffer in direction]
    # a NaN times zero would be a NaN
    moved = [
        torch.nan_to_num(buffer, nan=0.0, posinf=0.0, neginf=0.0).mul_(factor)
        for buffer, factor in zip(direction, factors, strict=True)
    ]
    return Move(layout, layout.unflatten(moved), layout.norm(moved), ~usable(length))


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes of the group, one exchange for each kind of tensor.

    Without a group nothing is done. All processes have to call this with tensors of the same shapes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not tensors:
        return
    layout = Buffers(tensors)
    averaged = layout.flatten(tensors)
    for buffer in averaged:
        torch.distributed.all_reduce(buffer)
        buffer.div_(torch.distributed.get_world_size())
    layout.copy_(averaged)
