"""Many points in one forward pass: a batch repeated once a point, each repetition meeting its own weights.

Only the modules whose weights move know about points; all others see a longer batch. A Linear layer with
stacked weights is one batched product; in the ``adapter`` space that is a batched B·A beside the one frozen
W, which is not copied. A module of a kind not known here takes its points one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flatbench.landscape.evaluation.replay import instead, mapped, tensors


def repeated(value: Any, rows: int, points: int) -> Any:
    """Every tensor that has ``rows`` rows repeated ``points`` times along them, point after point."""

    def change(part: Tensor) -> Tensor:
        if part.ndim == 0 or len(part) != rows:
            return part
        return part.repeat(points, *[1] * (part.ndim - 1))

    return mapped(value, change)


def at_point(value: Any, point: int, rows: int, points: int) -> Any:
    """The part of a repeated value that belongs to one point."""

    def change(part: Tensor) -> Tensor:
        if part.ndim == 0 or len(part) != rows * points:
            return part
        return part[point * rows : (point + 1) * rows]

    return mapped(value, change)


@contextlib.contextmanager
def stacked(model: nn.Module, weights: Mapping[int, Tensor], points: int, rows: int) -> Iterator[None]:
    """Inside, the model answers a batch repeated ``points`` times with each point's own weights.

    Args:
        weights: id of a parameter -> ``(points, *shape)``.
        rows: examples in the batch before it was repeated.
    """
    with contextlib.ExitStack() as stack:
        for module in _owners(model, set(weights)):
            stack.enter_context(instead(module, _forward(module, weights, points, rows)))
        yield


def _owners(model: nn.Module, changed: set[int]) -> list[nn.Module]:
    """Modules that hold changed parameters; not those inside a module that takes its points one by one."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        if any(id(p) in changed for p in module.parameters(recurse=False)):
            found.append(module)
            if _kind(module) is None:
                return
        for child in module.children():
            walk(child)

    walk(model)
    return found


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The known kind whose own ``forward`` the module has."""
    for kind in (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            plain = not isinstance(module, nn.Embedding) or module.max_norm is None
            return kind if plain else None
    return None


def _forward(module: Any, weights: Mapping[int, Tensor], points: int, rows: int) -> Callable[..., Any]:
    kind = _kind(module)
    if kind is None:
        return _forward_by_point(module, weights, points, rows)
    own = {name: weights.get(id(p)) for name, p in module.named_parameters(recurse=False)}
    weight: Any = own.get("weight")
    bias = own.get("bias")
    work: Callable[[Tensor], Tensor]
    if kind is nn.Embedding:
        work = partial(_embedding, weight, points)
    elif kind is nn.LayerNorm:
        work = partial(_layer_norm, module, weight, bias, points)
    else:
        work = partial(_linear, module, weight, bias, points)

    def forward(x: Tensor) -> Tensor:
        if len(x) == 1 and rows * points > 1:  # what all examples share, such as position ids
            x = x.expand(rows * points, *x.shape[1:])
        if len(x) != rows * points:
            raise ValueError(f"{type(module).__name__} was given {len(x)} rows of {rows} examples")
        return work(x)

    return forward


def _linear(module: Any, weight: Tensor | None, bias: Tensor | None, points: int, x: Tensor) -> Tensor:
    matrix = module.weight if weight is None else weight
    matrix = matrix if isinstance(module, Conv1D) else matrix.mT  # Conv1D stores (inputs, outputs)
    out = torch.matmul(x.reshape(points, -1, x.shape[-1]), matrix)
    if bias is not None:
        out = out + bias[:, None]
    elif module.bias is not None:
        out = out + module.bias
    return out.view(*x.shape[:-1], out.shape[-1])


def _embedding(weight: Tensor, points: int, ids: Tensor) -> Tensor:
    shift = torch.arange(points, device=ids.device) * weight.shape[1]
    moved = ids.reshape(points, -1) + shift[:, None]
    return nn.functional.embedding(moved.view(ids.shape), weight.flatten(0, 1))


def _layer_norm(module: Any, weight: Tensor | None, bias: Tensor | None, points: int, x: Tensor) -> Tensor:
    shape = module.normalized_shape
    out = nn.functional.layer_norm(x, shape, eps=module.eps).reshape(points, -1, *shape)
    for stack, fixed, add in ((weight, module.weight, False), (bias, module.bias, True)):
        part = fixed if stack is None else stack.unsqueeze(1)
        if part is not None:
            out = out + part if add else out * part
    return out.view(x.shape)


def _forward_by_point(
    module: nn.Module, weights: Mapping[int, Tensor], points: int, rows: int
) -> Callable[..., Any]:
    """The module's own forward for each point in turn, with the point's weights in its parameters."""
    original = module.forward
    moving = [p for p in module.parameters() if id(p) in weights]

    def forward(*args: Any, **kwargs: Any) -> Any:
        before = [p.data for p in moving]
        outputs = []
        try:
            for i in range(points):
                for parameter in moving:
                    parameter.data = weights[id(parameter)][i]
                given, named = at_point((args, kwargs), i, rows, points)
                outputs.append(original(*given, **named))
        finally:
            for parameter, data in zip(moving, before, strict=True):
                parameter.data = data
        return _concatenate(outputs)

    return forward


def _concatenate(outputs: Sequence[Any]) -> Any:
    """Outputs of the points as one, their tensors behind each other."""
    parts = [list(tensors(output)) for output in outputs]
    joined = iter([torch.cat(same) if same[0].ndim else same[0] for same in zip(*parts, strict=True)])
    return mapped(outputs[0], lambda _: next(joined))
