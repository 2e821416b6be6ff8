"""Losses and logits of a point's batches, gathered into the values of each split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flatbench.errors import InputError
from flatbench.labels import IGNORED
from flatbench.landscape.evaluation import replay
from flatbench.landscape.evaluation.packing import Batch
from flatbench.subject.objective import weighted_mean

#: split -> quantity -> value
Values = dict[str, dict[str, float]]
#: (logits of all examples of a split, their labels) -> one number, or several by name
LogitsFunction = Callable[[Tensor, Tensor], float | Tensor | Mapping[str, float]]


class Collected:
    """What one point's batches give, gathered over them."""

    def __init__(self, functions: Sequence[LogitsFunction]) -> None:
        self.functions = functions
        self.seen: dict[str, list[tuple[Tensor, int]]] = {}
        self.logits: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, split: str, batch: Batch, loss: Tensor, terms: int, logits: Tensor | None) -> None:
        """Take in a batch's mean loss, its terms, and its logits if functions want them."""
        self.seen.setdefault(split, []).append((loss, terms))
        if logits is not None:
            labels = next((batch[key] for key in replay.LABELS if key in batch), None)
            if labels is None:
                raise InputError("functions of the logits need labels, and the batches hold none")
            self.logits.setdefault(split, []).append((logits, labels))

    def values(self) -> Values:
        """Losses and functions of each split."""
        found: Values = {}
        for split, seen in self.seen.items():
            found[split] = {"loss": weighted_mean([(float(loss), terms) for loss, terms in seen])}
            if self.functions:
                found[split] |= _evaluate_functions(self.functions, self.logits[split])
        return found


def _evaluate_functions(
    functions: Sequence[LogitsFunction], pieces: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    try:
        logits, labels = (torch.cat(same) for same in zip(*_of_one_length(pieces), strict=True))
    except RuntimeError as error:
        raise InputError(
            "functions of the logits need logits of one shape an example; those of this model differ "
            f"between batches ({error})"
        ) from error
    found: dict[str, float] = {}
    for function in functions:
        value = function(logits, labels)
        if isinstance(value, Mapping):
            found |= {str(key): float(number) for key, number in value.items()}
        else:
            found[name_of(function)] = float(value)
    return found


def _of_one_length(pieces: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Logits and labels of tokens with labels that count for nothing behind those of shorter batches."""
    of_tokens = [y.ndim == 2 and z.ndim == 3 and y.shape == z.shape[:2] for z, y in pieces]
    if not all(of_tokens) or any(y.is_floating_point() for _, y in pieces):
        return list(pieces)
    longest = max(labels.shape[1] for _, labels in pieces)
    pad = torch.nn.functional.pad
    return [
        (pad(z, (0, 0, 0, longest - y.shape[1])), pad(y, (0, longest - y.shape[1]), value=IGNORED))
        for z, y in pieces
    ]


def name_of(function: LogitsFunction) -> str:
    """The name that a function's value goes by."""
    inner = function.func if isinstance(function, partial) else function
    return str(getattr(inner, "__name__", type(inner).__name__))


def logits_of(outputs: Sequence[Any]) -> Tensor:
    """The logits among what the model gave back last. Raises InputError if there are none."""
    if not outputs:
        raise InputError("functions of the logits: the loss does not call the model as a whole")
    output = outputs[-1]
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    logits = output if isinstance(output, Tensor) else held
    if not isinstance(logits, Tensor):
        raise InputError(f"functions of the logits: a {type(output).__name__} has no logits")
    return logits
