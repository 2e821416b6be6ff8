"""Measures as people name them, in the space that has a meaning for their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from flatbench import measures
from flatbench.curvature.operators.adapters import layers_in_use
from flatbench.errors import InputError
from flatbench.measures.base import Measure
from flatbench.report.text.glossary import ANSWERS
from flatbench.study import resolve_measure


def resolved(
    wanted: Sequence[str | Mapping[str, Any]], model: nn.Module, source: str
) -> dict[str, tuple[Measure, dict[str, Any]]]:
    """Measures by their labels, each with its options.

    The space, where none is named: ``merged``; for an update of an optimizer, and on a quantised base, which
    cannot be moved, ``adapter``; without an adapter ``all``.

    Raises InputError, naming ``source``, for unknown measures and options, and for two of one label.
    """
    found: dict[str, tuple[Measure, dict[str, Any]]] = {}
    adapted = bool(layers_in_use(model))
    quantised = any(not p.is_floating_point() or p.dtype.itemsize == 1 for p in model.parameters())
    for number, entry in enumerate(wanted):
        raw: dict[str, Any] = {"name": entry} if isinstance(entry, str) else dict(entry)
        where, name = f"measures[{number}]", raw.get("name")
        if isinstance(name, str) and name in measures.REGISTRY:
            fields = measures.REGISTRY.options(name).model_fields
            if "space" in fields and "space" not in raw:
                of_adapter = quantised or raw.get("direction", "gradient") != "gradient"
                raw["space"] = ("adapter" if of_adapter else "merged") if adapted else "all"
        label, config = resolve_measure(raw, source, where)
        if label in found:
            raise InputError(
                f"{source}: {where}: two measures are called '{label}'; give one a label of its own"
            )
        options = {key: value for key, value in config.items() if key != "name"}
        found[label] = measures.REGISTRY.load(config["name"])(**options), config
    return found


def answers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among a measure's values that are its answer; all numbers where none is known to be."""
    numbers = {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {k: v for k, v in numbers.items() if k in ANSWERS or k.startswith("eigenvalue_")} or numbers
