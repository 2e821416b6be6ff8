"""The plug-in mechanism: names that point to classes, loaded only when they are used.

Each plug-in kind (optimizer, task, measure, executor) has one `Registry`. A built-in plug-in is one
file and one line in its package's registry; a third party's is an entry point in the registry's group.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flatbench.config import lazy
from flatbench.errors import InputError, suggest

#: kinds of plug-ins whose constructors are written for flatbench, and how many arguments it hands over by
#: place (the base optimizer and the model); base optimizers are other libraries'
_BY_PLACE = {"optimizer": 2, "task": 0, "measure": 0}


class _Later:
    """Marks an option that was added after studies had been run without it."""


#: ``option: Annotated[bool, LATER] = False``: at its default the option is left out of what is written down
#: and hashed, so that runs made before it was there keep their ids
LATER = _Later()


#: type of an error of a section that names the option at fault itself
AT_OPTION = "at_option"


class Options(BaseModel):
    """Base of every model that checks what a study file says: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _leave_out_later_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name, field in type(self).model_fields.items():
            if LATER in field.metadata and getattr(self, name) == field.default:
                content.pop(name, None)
        return content

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, content: Any) -> Any:
        """Pydantic would read ``epochs: true`` as 1."""
        if isinstance(content, dict):
            for name, field in cls.model_fields.items():
                value = content.get(name)
                switch = any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value]))
                if switch and not _takes(bool, field.annotation):
                    raise PydanticCustomError(
                        AT_OPTION, "no switch; give a value, not true or false", {"option": name}
                    )
        return content


def _takes(kind: type, annotation: Any) -> bool:
    """Whether an annotation allows values of ``kind``, or anything."""
    if annotation in (kind, Any) or kind in get_args(annotation):
        return True
    return any(_takes(kind, part) for part in get_args(annotation) if not isinstance(part, str | int))


def _argument_types(plugin: type) -> dict[str, Any]:
    """The types of a constructor's arguments by their names."""
    owner: Any = next(kind for kind in plugin.__mro__ if "__init__" in vars(kind))
    if "__dataclass_fields__" not in vars(owner):
        return get_type_hints(owner.__init__, include_extras=True)
    # a generated constructor has the fields' types as text, which only the module of each class understands
    hints: dict[str, Any] = {}
    for kind in reversed(owner.__mro__):
        if "__dataclass_fields__" in vars(kind):
            hints |= inspect.get_annotations(kind, eval_str=True)
    return hints


@cache
def options_model(plugin: type) -> type[Options]:
    """The pydantic model of a plug-in's options: the keyword-only arguments of its constructor.

    The constructor's signature is the single place that names an option, its type, its bounds
    (``Annotated[float, Field(ge=0)]``) and its default. In a dataclass these are its fields.
    """
    constructor: Any = plugin.__init__  # type: ignore[misc]
    hints = _argument_types(plugin)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            default = ... if parameter.default is inspect.Parameter.empty else parameter.default
            fields[name] = (hints.get(name, Any), default)
    return create_model(f"{plugin.__name__}Options", __base__=Options, **fields)


@cache
def _check_keyword_only(plugin: type, kind: str) -> None:
    """Refuse a constructor with options that could be given by place: a study file names them."""
    parameters = inspect.signature(plugin).parameters.values()
    by_place = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if by_place := by_place[_BY_PLACE[kind] :]:
        raise InputError(
            f"{kind} {plugin.__module__}.{plugin.__qualname__}: the option '{by_place[0]}' is not "
            "keyword-only, so that no study file can set it; put * before it in __init__"
        )


@cache
def _entry_points(group: str) -> dict[str, str]:
    """Entry points of a group. Every look reads the metadata of all that is installed: one is enough."""
    return {point.name: point.value for point in entry_points(group=group)}


class Registry:
    """Names of one kind of plug-in.

    Args:
        kind: what the plug-ins are, in the singular, for messages.
        builtin: name -> ``"module:Class"``.
        group: entry-point group in which other packages may register more.
    """

    def __init__(self, kind: str, builtin: dict[str, str], group: str) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)

    def _targets(self) -> dict[str, str]:
        return {**_entry_points(self.group), **self._builtin}

    def names(self) -> list[str]:
        """All known names, built-in ones in the order in which they are listed, then others."""
        return [*self._builtin, *sorted(set(self._targets()) - set(self._builtin))]

    def classes(self) -> dict[str, str]:
        """The built-in plug-ins' classes: each one's name -> ``"module:Class"``."""
        return {target.rpartition(":")[2]: target for target in self._builtin.values()}

    def __contains__(self, name: object) -> bool:
        return name in self._targets()

    def _target(self, name: str) -> str:
        targets = self._targets()
        if name not in targets:
            raise InputError(f"unknown {self.kind} '{name}'; {suggest(name, targets)}")
        return targets[name]

    def load(self, name: str) -> Any:
        """The class behind ``name``. Raises InputError for an unknown name."""
        return lazy.load(self._target(name))

    def options(self, name: str) -> type[Options]:
        """The pydantic model that checks the options of ``name``.

        Raises InputError for an option that is not keyword-only.
        """
        plugin = self.load(name)
        if self.kind in _BY_PLACE:
            _check_keyword_only(plugin, self.kind)
        return options_model(plugin)

    def describe(self, name: str) -> str:
        """First line of the class's docstring, read from its source so that nothing heavy is imported."""
        module, _, attribute = self._target(name).partition(":")
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            return ""
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == attribute:
                return (ast.get_docstring(node) or "").partition("\n")[0]
        return ""
