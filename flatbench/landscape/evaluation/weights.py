"""The weights that a landscape moves, laid out in one buffer, so that reaching a point is one addition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Direction = Sequence[Tensor]
#: elements; views that begin at a multiple of this are aligned to 64 bytes in every precision
ALIGNMENT = 64


@dataclass
class _Group:
    """Parameters of one kind in one buffer."""

    places: list[tuple[int, nn.Parameter, int]]  # index, parameter, offset
    base: Tensor
    buffer: Tensor


class Weights:
    """Parameters at ``w + Σ_i t_i · d_i``, set as a whole.

    A context manager: inside, the parameters lie in buffers of its own; on the way out they are the tensors
    that they were before, which were never written to.

    Args:
        parameters: by name, in the order of the directions' parts; those whose direction is zero are best
            left out.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self._originals = [p.data for p in self.parameters.values()]
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        own = list(self.parameters.values())
        for index, parameter in enumerate(own):
            kinds.setdefault((parameter.dtype, parameter.device), []).append(index)
        self._groups = [self._group(own, indices) for indices in kinds.values()]

    @staticmethod
    def _group(own: Sequence[nn.Parameter], indices: Sequence[int]) -> _Group:
        places, offset = [], 0
        for index in indices:
            places.append((index, own[index], offset))
            offset += -(-own[index].numel() // ALIGNMENT) * ALIGNMENT
        base = torch.zeros(offset, dtype=own[indices[0]].dtype, device=own[indices[0]].device)
        for _, parameter, start in places:
            base[start : start + parameter.numel()] = parameter.detach().flatten()
        return _Group(places, base, base.clone())

    def __enter__(self) -> Weights:
        for group in self._groups:
            for _, parameter, start in group.places:
                parameter.data = group.buffer[start : start + parameter.numel()].view(parameter.shape)
        return self

    def __exit__(self, *_: object) -> None:
        for parameter, found in zip(self.parameters.values(), self._originals, strict=True):
            parameter.data = found

    def flat(self, direction: Direction) -> list[Tensor]:
        """A direction in the layout of the buffers; a tensor a kind of parameter."""
        laid = [torch.zeros_like(group.base) for group in self._groups]
        for group, target in zip(self._groups, laid, strict=True):
            for index, parameter, start in group.places:
                target[start : start + parameter.numel()] = direction[index].flatten()
        return laid

    def move(self, directions: Sequence[list[Tensor]], position: Sequence[float]) -> None:
        """Put the weights at ``((w + t_1·d_1) + t_2·d_2) + …``, rounded after each addition."""
        for k, group in enumerate(self._groups):
            if not directions:
                group.buffer.copy_(group.base)
            for i, (direction, t) in enumerate(zip(directions, position, strict=True)):
                torch.add(group.buffer if i else group.base, direction[k], alpha=t, out=group.buffer)

    def stack(
        self, directions: Sequence[list[Tensor]], positions: Sequence[Sequence[float]]
    ) -> dict[int, Tensor]:
        """The weights at many points: id of a parameter -> tensor ``(points, *shape)``."""
        stacked: dict[int, Tensor] = {}
        for k, group in enumerate(self._groups):
            rows = torch.tensor(positions, dtype=torch.float64).to(group.base)
            many = group.base.expand(len(positions), -1)
            for i, direction in enumerate(directions):
                many = torch.addcmul(many, rows[:, i : i + 1], direction[k])
            for _, parameter, start in group.places:
                part = many[:, start : start + parameter.numel()]
                stacked[id(parameter)] = part.unflatten(1, parameter.shape) if parameter.ndim else part[:, 0]
        return stacked
