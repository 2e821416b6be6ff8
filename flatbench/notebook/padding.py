"""Rows of different lengths made into batches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatbench.errors import InputError, shown
from flatbench.labels import IGNORED
from flatbench.notebook.expected import Expected

#: examples in a batch that is made here
BATCH_SIZE = 32
#: columns of tokens -> what their padding holds; the model's padding token where None
FILL: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "global_attention_mask": 0,
    "decoder_input_ids": None,
    "decoder_attention_mask": 0,
    "labels": IGNORED,
    "label": IGNORED,
}


def padded(
    features: Sequence[Mapping[str, Tensor]], model: Expected, where: str, dtype: Any
) -> list[dict[str, Tensor]]:
    """Batches of rows, each padded on its right to the longest of its batch.

    Args:
        dtype: of what is no whole number.

    Raises InputError for rows that make no batch.
    """
    batches = []
    for part in _parts(features, model):
        batch = {name: _together(name, [f[name] for f in part], model, where) for name in part[0]}
        # floats of NumPy and of Python are float64, which few models take
        batches.append({k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
    return batches


def _parts(features: Sequence[Mapping[str, Tensor]], model: Expected) -> list[list[Mapping[str, Tensor]]]:
    """The rows of each batch: in their order, but of one length each where a model reads padding.

    Models of spans compare all places of a row with each other, padded ones too.
    """
    groups = [list(features)]
    if model.kind == "span" and "input_ids" in features[0]:
        by_length = sorted(features, key=lambda f: len(f["input_ids"]))
        groups = [list(group) for _, group in itertools.groupby(by_length, lambda f: len(f["input_ids"]))]
    return [g[start : start + BATCH_SIZE] for g in groups for start in range(0, len(g), BATCH_SIZE)]


def _together(name: str, values: Sequence[Tensor], model: Expected, where: str) -> Tensor:
    """The values of a batch in one tensor; padded on the right: positions count from the left."""
    if len({value.shape for value in values}) == 1:
        return torch.stack(list(values))
    if name not in FILL or any(value.ndim != 1 for value in values):
        shapes = sorted({str(tuple(value.shape)) for value in values})
        raise InputError(f"{where}: '{name}' has rows of different shapes: {shown(', '.join(shapes), 120)}")
    fill = FILL[name]
    if fill is None:
        if model.padding is None and model.inputs and "attention_mask" not in model.inputs:
            raise InputError(
                f"{where}: '{name}' has rows of different lengths, and the model knows no padding token; "
                "give rows of one length, or batches"
            )
        fill = model.padding or 0
    longest = max(map(len, values))
    return torch.stack([torch.nn.functional.pad(v, (0, longest - len(v)), value=fill) for v in values])
