"""Labels of examples, read as the model takes them: classes by name or number, scores, one for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatbench.errors import InputError, shown
from flatbench.labels import IGNORED
from flatbench.notebook.expected import Expected
from flatbench.tasks.common import columns


class Classes:
    """How the labels of a column become numbers of the model's classes.

    Args:
        named: names of the classes in the model's order, if the caller said them.
        brought: the names that a data set gives the numbers of the column.

    Attributes:
        numbers: name -> class; empty where labels are numbers.
        brought: as given, if labels go by these names.
        notes: what was decided.

    Raises InputError for classes of the data of which the model knows only a part.
    """

    def __init__(self, model: Expected, named: Sequence[str] | None, brought: Sequence[str] | None) -> None:
        self.model, self.notes = model, list[str]()
        names = tuple(named or model.names)
        if named and model.classes is not None and model.kind != "score" and len(named) != model.classes:
            raise InputError(f"labels: {len(named)} names, but the model has {model.classes} classes")
        self.by_name = bool(named)
        self.numbers = {name: i for i, name in enumerate(names)}
        self.brought: tuple[str, ...] | None = None
        if brought is None or not names:
            return
        places = {name.casefold(): i for i, name in enumerate(names)}
        known = [name for name in brought if name.casefold() in places]
        if not known and not named:
            self.notes.append(f"labels by number (data: {_few(brought)}; model: {_few(names)})")
            return
        if len(known) < len(brought):
            raise InputError(
                f"labels: the data's classes are {_few(brought)}, the model's {_few(names)}; say the names "
                "of the model's classes in their order, as the data calls them: labels="
            )
        self.brought, self.numbers = tuple(brought), {name: places[name.casefold()] for name in brought}
        self.by_name = True
        self.notes.append(
            f"labels by name ({', '.join(f'{n} is {i}' for n, i in self.numbers.items())})"[:200]
        )

    def number(self, value: Any, where: str) -> int:
        """The class of a label. Raises InputError for one that is none."""
        if columns.missing(value):
            raise InputError(f"{where}: the label is missing")
        if (
            self.brought is not None
            and isinstance(value, int | np.integer)
            and 0 <= value < len(self.brought)
        ):
            return self.numbers[self.brought[int(value)]]
        if isinstance(value, str) or (self.by_name and self.brought is None):
            if not self.numbers:
                raise InputError(
                    f"{where}: the label is the text '{shown(value)}', and the model's classes have no "
                    "names; say them in the model's order: labels="
                )
            return columns.class_number(value, self.numbers, where)
        number = columns.score(int(value) if isinstance(value, bool | np.bool_) else value, where)
        if not number.is_integer():
            raise InputError(f"{where}: {number} is no class")
        return checked_class(int(number), self.model.classes, where)


def _few(names: Sequence[str]) -> str:
    return shown(", ".join(names), 120)


def checked_class(number: int, classes: int | None, where: str) -> int:
    """The number of a class. Raises InputError for one that the model has not; -100 counts for nothing."""
    if number != IGNORED and (number < 0 or (classes is not None and number >= classes)):
        known = f"the model's classes are 0 to {classes - 1}" if classes else "classes are numbered from 0"
        hidden = "; -1 is what data sets hold where labels are hidden: leave these examples out"
        raise InputError(f"{where}: label {number}: {known}{hidden if number == -1 else ''}")
    return number


def read_label(
    value: Any, classes: Classes, feature: Mapping[str, Tensor], own_loss: bool, where: str
) -> Tensor:
    """The label of an example as a tensor.

    Args:
        feature: the example's inputs.

    Raises InputError for a label that is missing, of another kind, or no class of the model.
    """
    model = classes.model
    if isinstance(value, list | tuple | np.ndarray | Tensor) and np.ndim(value) > 0:
        return _several(value, model, feature, own_loss, where)
    value = value.item() if isinstance(value, Tensor | np.ndarray) else value
    if columns.missing(value):
        raise InputError(f"{where}: the label is missing")
    if own_loss and model.kind in ("several", "token", "next token"):
        each = "class" if model.kind == "several" else "token"
        raise InputError(f"{where}: the model wants a label for each {each}, not '{shown(value)}'")
    fraction = isinstance(value, float | np.floating) and not float(value).is_integer()
    unknown = model.kind == "unknown" or not own_loss
    if model.kind == "score" or (unknown and fraction):
        return torch.tensor(columns.score(value, where), dtype=torch.float64)
    if unknown and not classes.by_name and not isinstance(value, str):
        kept = isinstance(value, float | np.floating)  # with loss=, the caller's function says what it means
        number = columns.score(int(value) if isinstance(value, bool | np.bool_) else value, where)
        return torch.tensor(number, dtype=torch.float64) if kept else torch.tensor(int(number))
    return torch.tensor(classes.number(value, where))


def _several(
    value: Any, model: Expected, feature: Mapping[str, Tensor], own_loss: bool, where: str
) -> Tensor:
    """A label that is a row of numbers."""
    try:
        found = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError):
        raise InputError(f"{where} holds no numbers of one shape") from None
    if model.kind in ("several", "score") or found.is_floating_point():
        if model.kind in ("several", "score") and tuple(found.shape) != (model.classes,):
            raise InputError(f"{where}: {tuple(found.shape)} labels; the model wants {model.classes} numbers")
        if not bool(torch.isfinite(found.double()).all()):
            raise InputError(f"{where}: the label is missing in part")
        return found.double()
    if own_loss and model.kind == "class":
        raise InputError(
            f"{where} holds {len(found)} labels, and the model predicts one of {model.classes} classes; for "
            "several classes an example set config.problem_type = 'multi_label_classification'"
        )
    tokens = feature.get("input_ids")
    if own_loss and tokens is not None and not model.encoder_decoder and len(found) != len(tokens):
        raise InputError(
            f"{where}: {len(found)} labels for {len(tokens)} tokens; labels of words must be spread over "
            f"their tokens, with {IGNORED} where none counts"
        )
    if own_loss:
        for number in found.unique().tolist():
            checked_class(int(number), model.classes, where)
    return found.long()
