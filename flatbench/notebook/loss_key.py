"""Tells one loss from another where results are kept by their content."""

from __future__ import annotations

import functools
import inspect
import sys
import uuid
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from flatbench.labels import unwrapped
from flatbench.landscape.content import data_digest
from flatbench.models import weights
from flatbench.store import digest

#: folders of installed packages, which are known by their names
_INSTALLED = {"site-packages", "dist-packages"}
_SIMPLE = (str, int, float, bool, bytes, type(None))


def loss_key(model: nn.Module, criterion: Any, counted: str) -> str:
    """Hex digest of a checkpoint's loss; another each time for what cannot be known again.

    A function is its source, its defaults, and what it reads from around it; a criterion of torch its options
    and buffers; a model's own loss its class and configuration.

    Args:
        criterion: as given to `load_checkpoint`; None for the model's own loss.
        counted: of what terms it is the mean.
    """
    if criterion is None:
        inner: Any = unwrapped(model)
        config = getattr(inner, "config", None)
        described: Any = config.to_dict() if config is not None and hasattr(config, "to_dict") else config
        parts: Any = [type(inner).__qualname__, _source(type(inner)), repr(described)]
    else:
        parts = _describe(criterion, set())
    return digest([counted, parts])


def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return str(uuid.uuid4())


def _describe(value: Any, seen: set[int]) -> Any:
    """What a value is, JSON-able."""
    if isinstance(value, _SIMPLE):
        return repr(value)
    if isinstance(value, ModuleType):
        return value.__name__
    if id(value) in seen:
        return "seen"
    seen.add(id(value))
    if isinstance(value, tuple | list):
        return [_describe(v, seen) for v in value]
    if isinstance(value, Mapping):
        return [[repr(k), _describe(v, seen)] for k, v in value.items()]
    if isinstance(value, functools.partial):
        return [_describe(v, seen) for v in (value.func, value.args, value.keywords)]
    if isinstance(value, nn.Module):
        options = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        return [
            _source(type(value)),
            _describe(type(value), seen),
            repr(value),
            _describe(options, seen),
            weights.digest(value),
            data_digest([dict(value.named_buffers())]),
        ]
    if inspect.isbuiltin(value):
        return (
            repr(value)
            if getattr(value, "__self__", None) is None
            else f"{value.__module__}.{value.__name__}"
        )
    if inspect.isfunction(value):
        return _function(value, seen)
    if inspect.ismethod(value):
        return [_function(value.__func__, seen), _describe(value.__self__, seen)]
    if isinstance(value, staticmethod | classmethod):
        return _describe(value.__func__, seen)
    if isinstance(value, property):
        return _describe((value.fget,), seen)
    if isinstance(value, Enum):
        return repr(value)
    return _class(value, seen) if isinstance(value, type) else str(uuid.uuid4())


def _class(kind: type, seen: set[int]) -> Any:
    """A class by its name; of the user's own, with what its methods read and its attributes are."""
    held = [
        [name, _describe(member, seen)]
        for base in kind.__mro__
        if _is_own(base)
        for name, member in vars(base).items()
        if inspect.isfunction(member) or not name.startswith(("__", "_abc_"))
    ]
    return [f"{kind.__module__}.{kind.__qualname__}", held]


def _function(function: Any, seen: set[int]) -> Any:
    if function.__module__.partition(".")[0] in ("torch", "transformers"):
        return f"{function.__module__}.{function.__qualname__}"
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    names = list(dict.fromkeys(_names(function.__code__)))
    around = [function.__globals__[name] for name in names if name in function.__globals__]
    # what is read of modules and classes, as settings are
    places = [each for each in (*around, *cells) if _is_own(each)]
    for place in places:
        held = [vars(place)[name] for name in names if name in vars(place)]
        around += held
        places += [each for each in held if _is_own(each) and each not in places]
    parts = [_describe(v, seen) for v in (*cells, *around, function.__defaults__, function.__kwdefaults__)]
    return [_source(function), *parts]


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function reads, and the functions inside of it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_own(thing: Any) -> bool:
    """Whether something is a module or class of the user's own, not of Python or an installed package."""
    if not isinstance(thing, ModuleType | type):
        return False
    module = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    root = module.partition(".")[0]
    known = root == "flatbench" or root in sys.stdlib_module_names
    return not known and not _INSTALLED.intersection(file.parts)
