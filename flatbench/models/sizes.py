"""How large a model is by its configuration alone, before anything of that size is made; imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from flatbench.errors import InputError
from flatbench.store.files import read_regular

#: layers and weights of which no model has more: a configuration that says so is damaged, or no model's
MOST_LAYERS, MOST_WEIGHTS = 10_000, 1e13
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_INNER = ("intermediate_size", "d_ff", "ffn_dim", "n_inner")
#: names of numbers of layers; of those in a row one counts, and the two of an encoder and a decoder both do
_LAYERS = (
    ("num_hidden_layers",),
    ("n_layer",),
    ("n_layers",),
    ("depth",),
    ("num_layers", "num_decoder_layers"),
    ("encoder_layers", "decoder_layers"),
)


def described(content: Mapping[str, Any]) -> tuple[int, float]:
    """Layers, and about how many weights, that a configuration of transformers describes.

    Each layer is counted as attention and a perceptron: 4 h² + 2 h f weights at width h and inner width f.
    """
    layers, weights = 0, 0.0
    for section in _sections(content):
        own = max(sum(_number(section, name) for name in names) for names in _LAYERS)
        width = max(_number(section, name) for name in _HIDDEN)
        inner = max(_number(section, name) for name in _INNER) or 4 * width
        experts = max(1, _number(section, "num_local_experts"), _number(section, "num_experts"))
        layers += own
        weights += float(own) * (4.0 * width * width + 2.0 * width * inner * experts)
        weights += float(_number(section, "vocab_size")) * width
    return layers, weights


def check(content: Mapping[str, Any], where: str, bytes_per_weight: float) -> None:
    """Raise InputError for a configuration that describes what no model is, with the memory it would take."""
    layers, weights = described(content)
    if layers > MOST_LAYERS or weights > MOST_WEIGHTS:
        raise InputError(
            f"{where}: its config.json describes {layers:,} layers with about {weights:.2g} weights, which "
            f"would take {_memory(weights * bytes_per_weight)}; no model is as large, so the file is damaged"
        )


def check_file(path: Path, where: str, bytes_per_weight: float = 4.0) -> None:
    """`check` a config.json before transformers reads it, which makes a list as long as there are layers.

    What is no JSON is left to transformers to refuse.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(read_regular(path))
        if isinstance(content, dict):
            check(content, where, bytes_per_weight)


def note(content: Mapping[str, Any], name: str, bytes_per_weight: float) -> str | None:
    """A line on a model that is larger than this machine's memory; None for any other."""
    weights = described(content)[1]
    there = psutil.virtual_memory().total
    if weights * bytes_per_weight <= there:
        return None
    return (
        f"{name} has about {weights:.2g} weights, which take {_memory(weights * bytes_per_weight)}; this "
        f"machine has {_memory(there)} of memory"
    )


def _sections(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield content
    for value in content.values():
        if isinstance(value, Mapping):
            yield from _sections(value)


def _number(section: Mapping[str, Any], name: str) -> int:
    value = section.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _memory(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count < 1e12 else f"{count / 1e12:,.3g} TB"
