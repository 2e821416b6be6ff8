"""Models that are chains of blocks: found by their structure; what each block is called with is caught."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators.graphs import depends_on
from flatbench.errors import InputError

#: the class by which transformers marks what is computed block by block
_MARK = "GradientCheckpointingLayer"


class NoChain(Exception):  # noqa: N818 - an answer, not an error
    """The blocks are no chain of functions; the message says why."""


def chains(model: nn.Module) -> list[list[nn.Module]]:
    """Lists of two or more blocks in a row that may be a chain, those with the most weights first.

    A list is a module list (or a sequence) of one class, or of blocks that transformers marks as such.
    """
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or id(module) in inside:
            continue
        blocks = list(module)
        if len(blocks) > 1 and len({id(block) for block in blocks}) == len(blocks) and _alike(blocks):
            found.append(blocks)
            inside |= {id(each) for each in module.modules()}
    return sorted(found, key=_weights, reverse=True)


def _alike(blocks: Sequence[nn.Module]) -> bool:
    if not all(any(True for _ in block.parameters()) for block in blocks):
        return False
    marked = all(any(kind.__name__ == _MARK for kind in type(block).__mro__) for block in blocks)
    composed = all(any(True for _ in block.children()) for block in blocks)
    return marked or (composed and len({type(block) for block in blocks}) == 1)


def _weights(blocks: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())


@dataclass
class Call:
    """A block with what it was called with.

    Attributes:
        forward: the block's own.
        place: where among the arguments the hidden state stands: a position or a name.
        x: the hidden state, without a graph.
    """

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str
    x: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The block's hidden state for another one in the place of ``x``."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.place, int):
            args[self.place] = x
        else:
            kwargs[self.place] = x
        return _hidden_state(self.forward(*args, **kwargs))


def _hidden_state(found: Any) -> Tensor:
    first = found[0] if isinstance(found, tuple | list) and found else found
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise NoChain("a block does not give one hidden state")
    return first


class Walk:
    """A forward pass whose blocks are computed without graphs.

    Attributes:
        calls: the blocks in their order.
        stem: the hidden state that the first block was given, with its graph.
    """

    def __init__(self, blocks: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._blocks: list[Any] = list(blocks)
        self._arguments: list[tuple[tuple[Any, ...], Mapping[str, Any], int | str | None]] = []
        self._last: Tensor | None = None
        self.calls: list[Call] = []
        self.stem: Tensor

    @contextlib.contextmanager
    def intercepted(self) -> Iterator[None]:
        """Inside, a pass of the model is noted; afterwards `calls` and `stem` are there.

        Raises NoChain where the blocks do not follow one another, each called once, with nothing between.
        """
        own = [vars(block).get("forward") for block in self._blocks]
        forwards = [block.forward for block in self._blocks]
        try:
            for index, (block, forward) in enumerate(zip(self._blocks, forwards, strict=True)):
                block.forward = self._note_call(index, forward)
            yield
        finally:
            for block, before in zip(self._blocks, own, strict=True):
                if before is None:
                    del block.forward
                else:
                    block.forward = before
        self._finish(forwards)

    def last(self) -> Tensor:
        """The last block's hidden state, a leaf, while the pass is under way."""
        if len(self._arguments) != len(self._blocks) or self._last is None:
            raise NoChain(f"{len(self._blocks) - len(self._arguments)} blocks were not called")
        return self._last

    def _note_call(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def noted(*args: Any, **kwargs: Any) -> Any:
            if index != len(self._arguments):
                raise NoChain(f"block {index} is called more than once, or out of order")
            place = self._place(args, kwargs) if index else None
            self._arguments.append((args, kwargs, place))
            with torch.no_grad():
                found = forward(*args, **kwargs)
            last = index == len(self._blocks) - 1
            self._last = _hidden_state(found).detach().requires_grad_(last)
            if isinstance(found, tuple | list):
                return type(found)((self._last, *found[1:]))
            return self._last

        return noted

    def _place(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str:
        """Where the hidden state of the block before stands."""
        named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        found = [key for key, value in named if value is self._last]
        if len(found) != 1:
            raise NoChain(
                "a block is given the hidden state of the one before more than once"
                if found
                else "a block is given something else than the hidden state of the one before"
            )
        return found[0]

    def _finish(self, forwards: Sequence[Callable[..., Any]]) -> None:
        self.last()
        second = self._arguments[1][2] if len(self._arguments) > 1 else None
        for index, (args, kwargs, place) in enumerate(self._arguments):
            if place is None:
                place = second if second is not None else (0 if args else "hidden_states")
            held = _argument(args, kwargs, place)
            if not isinstance(held, Tensor) or not held.is_floating_point():
                raise NoChain("the first block is not given a hidden state where the others are")
            self._check_others(args, kwargs, held, index)
            if index == 0:
                self.stem = held
            rest = _without(args, kwargs, place)
            self.calls.append(Call(self._blocks[index], forwards[index], *rest, place, held.detach()))
        self._arguments, self._last = [], None

    def _check_others(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], held: Tensor, index: int
    ) -> None:
        """Raise NoChain if another argument depends on the space, or remembers calls."""
        for key, value in (*enumerate(args), *kwargs.items()):
            others = [each for each in cutting.tensors(value) if each is not held]
            if any(depends_on(each, self._parameters) for each in others):
                raise NoChain(
                    f"block {index} also reads something that depends on the space (argument {key})"
                )
            if hasattr(value, "update") and hasattr(value, "get_seq_length"):
                raise NoChain("the blocks write to a cache (use_cache)")


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int | str) -> Any:
    if isinstance(place, int):
        return args[place] if place < len(args) else None
    return kwargs.get(place)


def _without(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int | str
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments without the hidden state, which `Call` holds without a graph."""
    if isinstance(place, int):
        return (*args[:place], None, *args[place + 1 :]), kwargs
    return args, {**kwargs, place: None}


@contextlib.contextmanager
def without_cache(model: nn.Module, losses: Callable[[], list[float]], coarse: float) -> Iterator[None]:
    """Inside, decoders in the manner of transformers keep no keys and values of earlier tokens.

    Args:
        losses: of a few rows, which are to be the same with the cache as without.
        coarse: relative error of a loss by half precision.

    Raises InputError where they are not: packed sequences see each other where there is a cache.
    """
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    found = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    before = losses() if found else []
    try:
        for config in found:
            config.use_cache = False
        for one, other in zip(before, losses() if found else [], strict=True):
            if not math.isclose(one, other, rel_tol=1e-5 + coarse) and not (
                math.isnan(one) and math.isnan(other)
            ):
                raise InputError(
                    f"the loss of a few rows is {one:.6g} as the model is and {other:.6g} without its cache "
                    "of keys and values: sequences packed into one row (position_ids that restart) see each "
                    "other where there is a cache; set model.config.use_cache = False, as transformers' "
                    "Trainer does in training, or give an attention_mask"
                )
        yield
    finally:
        for config in found:
            config.use_cache = True
