"""Module calls recorded in one forward pass and played back in others, so that they need not be computed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

#: what one forward pass leaves behind: outputs of each recorded module, in the order of its calls
Record = dict[nn.Module, list[Any]]


@dataclass
class Call:
    """One call of a module within a forward pass.

    Attributes:
        parent: index of the call it was made in, -1 for none.
        start, end: its place in time; every start and end of a call is one tick.
        arguments: ids of the tensors it was given.
        elements: size of the tensors it returned.
    """

    module: nn.Module
    parent: int
    start: int
    end: int
    arguments: frozenset[int]
    elements: int


def trace(model: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """The calls of the model and of its modules in ``run()``, in the order in which they begin."""
    calls: list[Call] = []
    open_: list[int] = []
    tick = 0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal tick
        given = frozenset(id(t) for t in tensors((args, kwargs)))
        calls.append(Call(module, open_[-1] if open_ else -1, tick, -1, given, 0))
        open_.append(len(calls) - 1)
        tick += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal tick
        call = calls[open_.pop()]
        call.end, call.elements = tick, sum(t.numel() for t in tensors(output))
        tick += 1

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        run()
    return calls


def unreached(calls: Sequence[Call], changed: set[int]) -> list[nn.Module]:
    """The outermost modules whose every call ends before weights that change are read for the first time.

    Their outputs cannot depend on these weights, whatever the model does with them.

    Args:
        changed: ids of the parameters that change.
    """
    called = {id(call.module) for call in calls}
    first = min((c.start for c in calls if _reads(c.module, changed, called)), default=-1)
    late = {id(c.module) for c in calls if c.end > first or c.end < 0}
    untouched = {id(c.module) for c in calls} - late
    return _outermost(calls, lambda call: id(call.module) in untouched)


def _reads(module: nn.Module, changed: set[int], called: set[int]) -> bool:
    """Whether a call may read a changed parameter itself: its own, or that of a module never called.

    (torch's MultiheadAttention uses the weights of its output layer without calling it.)
    """
    if any(id(p) in changed for p in module.parameters(recurse=False)):
        return True
    return any(id(child) not in called and _reads(child, changed, called) for child in module.children())


def without_labels(calls: Sequence[Call], batch: Mapping[str, Tensor]) -> list[nn.Module]:
    """The outermost modules that are not handed the labels: all of the model but its loss."""
    labels = {id(value) for key, value in batch.items() if key in LABELS}
    return _outermost(calls, lambda call: not call.arguments & labels)


#: names under which batches hold what a loss compares the model's answer with
LABELS = ("labels", "label", "targets", "target", "start_positions", "end_positions")


def _outermost(calls: Sequence[Call], wanted: Callable[[Call], bool]) -> list[nn.Module]:
    inside: set[int] = set()
    found: dict[int, nn.Module] = {}
    for index, call in enumerate(calls):
        if call.parent in inside:
            inside.add(index)
        elif wanted(call):
            inside.add(index)
            found[id(call.module)] = call.module
    return list(found.values())


@contextlib.contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[Record]:
    """Inside, what the modules give back is kept in the record."""
    record: Record = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        record.setdefault(module, []).append(_copy_container(output))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(keep).remove)
        yield record


@contextlib.contextmanager
def played(record: Record) -> Iterator[None]:
    """Inside, in one forward pass, the record's modules give back what is recorded and compute nothing."""
    with contextlib.ExitStack() as stack:
        for module, outputs in record.items():
            stack.enter_context(instead(module, _Player(outputs)))
        yield


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module's ``forward`` is another function; attributes of the instance are put back after."""
    own = module.__dict__.get("forward")  # a plain attribute, as accelerate's hooks set it too
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


class _Player:
    """Gives back outputs one after the other, whatever it is called with."""

    def __init__(self, outputs: Sequence[Any]) -> None:
        self.outputs = iter(outputs)

    def __call__(self, *_: Any, **__: Any) -> Any:
        return _copy_container(next(self.outputs))


def _copy_container(output: Any) -> Any:
    """The same output in a container of its own: models put other things into those of their modules."""
    return output if isinstance(output, Tensor) else copy.copy(output)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings, dataclasses and namespaces."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        yield from tensors(vars(value))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy with every tensor changed, where `tensors` would find it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):  # a transformers ModelOutput is one, and is made from keywords
        parts = {key: mapped(part, change) for key, part in value.items()}
        return type(value)(**parts) if hasattr(value, "to_tuple") else parts
    if isinstance(value, tuple | list):
        kind = tuple if isinstance(value, tuple) else list
        return kind(mapped(part, change) for part in value)
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**mapped(vars(value), change))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **mapped(vars(value), change))
    return value


def size(record: Record) -> int:
    """Bytes of the tensors in a record."""
    return sum(t.numel() * t.element_size() for t in tensors(list(record.values())))
