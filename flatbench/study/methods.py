"""Methods: adapter x optimizer x base optimizer, from the shorthands that a person writes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from flatbench import optim
from flatbench.config.names import NAME
from flatbench.config.registry import Options
from flatbench.config.sections import ADAPTER_SHORTHANDS, AdapterOptions, TrainOptions
from flatbench.config.validation import plugin, validated
from flatbench.errors import InputError, shown, suggest
from flatbench.optim import bases

Grid = dict[str, Annotated[list[Any], Field(min_length=1)]]
Name = Annotated[str, Field(pattern=f"^{NAME}$")]

#: methods that are known by name though no optimizer has that name
METHOD_SHORTHANDS: dict[str, dict[str, Any]] = {
    "full_ft": {"adapter": "none", "optimizer": "plain"},
    "lora": {"optimizer": "plain"},
}
METHOD_DESCRIPTIONS = {
    "full_ft": "Every weight of the model trains with the base optimizer.",
    "lora": "The base optimizer on the adapter's A and B.",
}


class Method(Options):
    """One entry of ``methods:``, with shorthands written out: adapter x optimizer x base optimizer."""

    name: Name
    adapter: AdapterOptions
    optimizer: dict[str, Any]
    train: TrainOptions
    grid: Grid = {}


class _MethodEntry(Options):
    """A mapping under ``methods:`` before its shorthands are written out."""

    name: Name
    adapter: str | dict[str, Any] | None = None
    optimizer: str | dict[str, Any] | None = None
    train: dict[str, Any] = {}
    grid: Grid = {}


def resolve_method(
    raw: str | Mapping[str, Any], index: int, study_adapter: Any, train: TrainOptions, source: str
) -> Method:
    """One entry of ``methods:`` written out. Raises InputError naming the entry and the field."""
    where = f"methods[{index}]"
    entry = validated(_MethodEntry, {"name": raw} if isinstance(raw, str) else raw, source, where)
    given = entry.model_dump(exclude_none=True)
    shorthand = _shorthand(entry)
    if shorthand is not None:
        if shorthand not in METHOD_SHORTHANDS and shorthand not in optim.REGISTRY:
            known = {*METHOD_SHORTHANDS, *optim.REGISTRY.names(), *optim.ALIASES}
            raise InputError(
                f"{source}: {where}: unknown method '{entry.name}'; {suggest(entry.name, known)}"
            )
        given = {**METHOD_SHORTHANDS.get(shorthand, {"optimizer": shorthand}), **given}
    adapter = _adapter(study_adapter, source, "adapter")
    if "adapter" in given:
        own = _adapter(given["adapter"], source, f"{where}.adapter")
        # full fine-tuning keeps the study's target modules: the merged space is measured on them as well
        kept = {"target_modules": adapter.get("target_modules")} if own.get("name") == "none" else adapter
        adapter = {**kept, **own}
    optimizer = given["optimizer"]
    optimizer = {"name": optimizer} if isinstance(optimizer, str) else optimizer
    options = validated(AdapterOptions, adapter, source, f"{where}.adapter")
    resolved = _optimizer(optimizer, source, f"{where}.optimizer")
    if options.name == "none" and shorthand == "lora":
        raise InputError(
            f"{source}: {where}: 'lora' trains an adapter, and the study has none; call the method full_ft"
        )
    if options.name == "none" and getattr(optim.REGISTRY.load(resolved["name"]), "needs_adapter", False):
        raise InputError(
            f"{source}: {where}: optimizer '{resolved['name']}' works on an adapter, and this method has "
            "none; choose an adapter or another optimizer"
        )
    return Method(
        name=entry.name,
        adapter=options,
        optimizer=resolved,
        train=validated(TrainOptions, {**train.model_dump(), **entry.train}, source, f"{where}.train"),
        grid=entry.grid,
    )


def _shorthand(entry: _MethodEntry) -> str | None:
    """The method that an entry's name stands for; None where its optimizer is written out."""
    return optim.ALIASES.get(entry.name, entry.name) if entry.optimizer is None else None


def _adapter(raw: Any, source: str, where: str) -> dict[str, Any]:
    if isinstance(raw, str):
        if raw not in ADAPTER_SHORTHANDS:
            raise InputError(
                f"{source}: {where}: unknown adapter '{shown(raw)}'; {suggest(raw, ADAPTER_SHORTHANDS)}"
            )
        return dict(ADAPTER_SHORTHANDS[raw])
    name = raw.get("name")
    shorthand = ADAPTER_SHORTHANDS.get(name, {}) if isinstance(name, str) else {}
    return {**shorthand, **raw, **({"name": shorthand["name"]} if shorthand else {})}


def _optimizer(raw: Mapping[str, Any], source: str, where: str) -> dict[str, Any]:
    own = {key: value for key, value in raw.items() if key != "base"}
    if isinstance(own.get("name"), str):
        own["name"] = optim.ALIASES.get(own["name"], own["name"])
    name, options = plugin(optim.REGISTRY, own, source, where)
    return {"name": name, **options, "base": bases.checked(raw.get("base", {}), source, f"{where}.base")}


def canonical(method: Method, grid: Grid, source: str, where: str) -> Grid:
    """The grid with every option under its shortest name, so that one option has one name."""
    options = optim.REGISTRY.options(method.optimizer["name"]).model_fields
    found: Grid = {}
    for key, values in grid.items():
        section, _, option = key.partition(".")
        owner = "optimizer" if option in options else "train"
        short = option if option and section == owner else key
        if short in found:
            raise InputError(f"{source}: {where}.{shown(key)}: '{short}' stands in it twice")
        found[short] = values
    return found


def with_choice(method: Method, choice: Mapping[str, Any], source: str, where: str) -> Method:
    """``method`` with each ``key: value`` put into the section that owns the key."""
    sections: dict[str, dict[str, Any]] = {
        "adapter": method.adapter.model_dump(),
        "optimizer": dict(method.optimizer),
        "train": method.train.model_dump(),
    }
    options = optim.REGISTRY.options(method.optimizer["name"]).model_fields
    for key, value in choice.items():
        section, dot, option = key.partition(".")
        if not dot:
            section, option = ("optimizer" if key in options else "train"), key
        known = {
            "adapter": [*AdapterOptions.model_fields],
            "optimizer": [*options],
            "train": [*TrainOptions.model_fields],
        }
        if section not in known:
            raise InputError(f"{source}: {where}.{shown(key)}: unknown section; {suggest(section, known)}")
        if option not in known[section]:
            all_known = known[section] if dot else {*options, *TrainOptions.model_fields}
            raise InputError(
                f"{source}: {where}.{shown(key)}: no such option here; {suggest(option, all_known)}"
            )
        sections[section][option] = value
    return Method(
        name=method.name,
        adapter=validated(AdapterOptions, sections["adapter"], source, where),
        optimizer=_optimizer(sections["optimizer"], source, where),
        train=validated(TrainOptions, sections["train"], source, where),
        grid=method.grid,
    )
