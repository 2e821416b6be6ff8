"""Examples made into batches: which columns are taken, how labels are read, texts tokenised, rows padded.

Nothing is guessed: where columns do not say by themselves what they are, they must be named. What was taken
is told in `Taken`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatbench.config import sources
from flatbench.errors import InputError, shown
from flatbench.labels import IGNORED
from flatbench.notebook.expected import SPAN, Expected
from flatbench.notebook.marks import Classes, read_label
from flatbench.notebook.padding import padded
from flatbench.tasks.common import columns
from flatbench.tasks.common.tokenising import tokenise

#: names under which examples hold their label
LABELS = ("labels", "label")
#: columns of published data sets that are pairs of texts by their names
PAIRS = {(d.columns["text"], d.columns["text_pair"]) for d in sources.DATA if "text_pair" in d.columns}
#: columns that hold text, but none to read
NO_TEXT = {
    "id",
    "idx",
    "index",
    "uid",
    "guid",
    "uuid",
    "pairid",
    "key",
    "name",
    "url",
    "path",
    "file",
    "title",
}
#: above this, what a tokenizer calls its longest text means that it knows no limit
NO_LIMIT = 10**6


@dataclass(frozen=True)
class Named:
    """What the caller named.

    Attributes:
        text: the column of the text, or the two of a pair of texts.
        label: the column of the label.
        classes: names of the classes in the model's order.
        max_length: tokens per text, special ones included; longer ones are cut, and counted.
    """

    text: tuple[str, ...] | None = None
    label: str | None = None
    classes: tuple[str, ...] | None = None
    max_length: int | None = None

    @classmethod
    def of(
        cls,
        text: str | Sequence[str] | None,
        label: str | None,
        classes: Sequence[str] | None,
        max_length: int | None,
    ) -> Named:
        """What was named, of arguments as people give them."""
        texts = (text,) if isinstance(text, str) else text
        if isinstance(classes, str | Mapping):
            raise InputError(f"labels: give a list of names in the model's order, not {shown(repr(classes))}")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length: {max_length}; a text has one token at least")
        return cls(
            None if texts is None else tuple(texts),
            label,
            None if classes is None else tuple(map(str, classes)),
            max_length,
        )


@dataclass
class Taken:
    """What was taken of a split.

    Attributes:
        examples: how many there are.
        inputs: the columns that the model reads, or whose texts are tokenised.
        label: the column that the label is from; None where there is none.
        unused: columns that were left out.
        notes: whatever else was decided.
    """

    examples: int = 0
    inputs: list[str] = field(default_factory=list)
    label: str | None = None
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line."""
        parts = [f"{self.examples} examples", f"inputs {', '.join(self.inputs) or 'none'}"]
        if self.label is not None:
            parts.append(f"label {self.label}")
        if self.unused:
            parts.append(f"not used: {', '.join(self.unused)}")
        return "; ".join(parts + self.notes)


@dataclass(frozen=True)
class Rows:
    """Examples of a split: rows, the names of their columns, and of classes where a column brings them."""

    rows: Sequence[Mapping[str, Any]]
    names: tuple[str, ...]
    classes: Mapping[str, Sequence[str]]
    where: str

    def column(self, name: str) -> list[Any]:
        """The cells of a column; None in rows that lack it."""
        return [row.get(name) for row in self.rows]

    def first(self, name: str) -> Any:
        """The first cell of a column that is not missing."""
        return next((v for v in self.column(name) if not columns.missing(v)), None)

    def cell(self, number: int, name: str) -> str:
        """Where a cell is, for messages."""
        return f"{self.where}, row {number}: column '{name}'"

    def __str__(self) -> str:
        return shown(", ".join(self.names), 300)


def batches_of(
    table: Rows, model: Expected, named: Named, find_tokenizer: Callable[[], Any], own_loss: bool, dtype: Any
) -> tuple[list[dict[str, Tensor]], Taken]:
    """Batches of examples in their order, padded on the right to the longest of each, and what was taken.

    Args:
        own_loss: whether the loss is the model's own.
        dtype: of scores.

    Raises InputError for columns that are not there, or that say not by themselves what they are, and for
    cells that hold nothing of use.
    """
    ready = [] if named.text else model.ready(table.names)
    if ready:
        if named.max_length is not None:
            raise InputError(f"max_length: {table.where}: the examples are tokenised already")
        label = _label_column(table, model, named, True, own_loss)
        features = _ready(table, model, ready)
        taken = Taken(inputs=ready)
    else:
        label = _label_column(table, model, named, False, own_loss)
        texts = _text_columns(table, named, label)
        features, taken = _tokenised(table, model, texts, named.max_length, find_tokenizer())
    spans = [name for name in model.labels if name in table.names and name not in LABELS] if ready else []
    marks = Classes(model, named.classes, table.classes.get(label or ""))
    _add_labels(table, model, features, label, spans, marks, own_loss)
    taken.examples, taken.label = len(table.rows), label or (", ".join(spans) or None)
    used = {*taken.inputs, label, *spans}
    taken.unused = [name for name in table.names if name not in used]
    taken.notes += marks.notes if label is not None else []
    if label is None and model.kind == "next token":
        taken.notes.append("labels: each next token of the text")
    return padded(features, model, table.where, dtype), taken


# -- which columns ----------------------------------------------------------------------------------------


def _label_column(table: Rows, model: Expected, named: Named, ready: bool, own_loss: bool) -> str | None:
    """The column of the label; None where the text itself, a span or nothing is predicted."""
    if named.label is not None:
        columns.require_columns(table.names, [named.label], f"label_column: {table.where}")
        if own_loss and (
            model.kind in ("span", "none") or (not ready and model.kind in ("next token", "token"))
        ):
            raise _no_such_label(table, model)
        return named.label
    found = [name for name in LABELS if name in table.names]
    if own_loss and model.kind == "span":
        missing = [name for name in SPAN if name not in table.names]
        if missing or not ready:
            raise _no_such_label(table, model)
        return None
    if own_loss and model.kind == "none":
        return None
    if model.kind == "next token":
        # a class beside a text is no label of a language model
        return (
            "labels" if ready and isinstance(table.first("labels"), Sequence | np.ndarray | Tensor) else None
        )
    if own_loss and model.kind == "token" and not ready:
        raise _no_such_label(table, model)
    if own_loss and model.inputs and not model.labels:
        return None  # the model takes none; if it gives no loss, that is said
    if len(found) > 1:
        raise InputError(f"{table.where}: columns 'labels' and 'label'; say which with label_column=")
    if not found:
        raise InputError(f"{table.where}: examples without a label ({table}); name it with label_column=")
    return found[0]


def _no_such_label(table: Rows, model: Expected) -> InputError:
    wanted = {
        "span": f"a span of the text: give examples with input_ids, {' and '.join(SPAN)}",
        "next token": "each next token of the text, and no column of labels; leave label_column= away, or "
        "give examples with input_ids and labels, a label for each token",
        "token": "a label for each token: give examples with input_ids and labels",
        "none": "what is hidden of its inputs; leave label_column= away",
    }[str(model.kind)]
    return InputError(f"{table.where}: the model predicts {wanted} ({table})")


def _text_columns(table: Rows, named: Named, label: str | None) -> list[str]:
    if named.text:
        columns.require_columns(table.names, named.text, f"text_columns: {table.where}")
        if not 1 <= len(named.text) <= 2:
            raise InputError(f"text_columns: {len(named.text)} columns; give one, or two of a pair of texts")
        return list(named.text)
    left = [name for name in table.names if name not in (label, *LABELS)]
    found = [name for name in left if isinstance(table.first(name), str)]
    if tuple(found) in PAIRS or (len(found) == 1 and found[0].lower() not in NO_TEXT):
        words = [n for n in left if isinstance(table.first(n), list) and _of_texts(table.first(n))]
        if not words:
            return found
        found += words
    if found:
        known = next((list(pair) for pair in sorted(PAIRS) if set(pair) <= set(found)), None)
        example = repr(known or found) if known or len(found) <= 2 else "[…]"
        raise InputError(
            f"{table.where}: which of the columns {shown(', '.join(found), 300)} hold the text? name one, or "
            f"the two of a pair of texts, in their order: text_columns={example}"
        )
    raise InputError(
        f"{table.where}: examples with neither text nor {'input_ids' if not model_image(table) else ''}"
        f"{'pixel_values; an image processor makes them of images' if model_image(table) else ''} ({table})"
    )


def model_image(table: Rows) -> bool:
    """Whether a column holds images."""
    return any(hasattr(table.first(name), "getpixel") for name in table.names)


def _of_texts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(v, str) for v in value)


# -- features ---------------------------------------------------------------------------------------------


def _ready(table: Rows, model: Expected, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """The cells of the columns that the model reads, as tensors."""
    features: list[dict[str, Tensor]] = [{} for _ in table.rows]
    for name in names:
        for number, value in enumerate(table.column(name)):
            features[number][name] = as_tensor(value, table.cell(number, name))
    for number, feature in enumerate(features):
        if "input_ids" in feature:
            ids = feature["input_ids"]
            check_tokens(ids, model, table.cell(number, "input_ids"))
            if ids.ndim == 1 and ("attention_mask" in model.inputs or not model.inputs):
                feature.setdefault("attention_mask", torch.ones_like(ids))
    return features


def as_tensor(value: Any, where: str) -> Tensor:
    """The numbers of a cell. Raises InputError if it holds nothing, or something else."""
    if isinstance(value, Tensor):
        return value.detach()
    if columns.missing(value):
        raise InputError(f"{where} is empty")
    try:
        found = np.asarray(value)
        if found.dtype == object or found.dtype.kind not in "biuf":
            raise TypeError(f"{type(value).__name__} of {found.dtype}")
        return torch.as_tensor(found)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} holds no numbers of one shape ({shown(error, 100)})") from None


def check_tokens(ids: Tensor, model: Expected, where: str) -> None:
    """Raise InputError for tokens that the model has not, and for more of them than it takes."""
    if not ids.numel() or ids.is_floating_point():
        raise InputError(f"{where} holds no token ids")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (model.vocabulary is not None and high >= model.vocabulary):
        raise InputError(
            f"{where}: token {low if low < 0 else high}; the model has {model.vocabulary} tokens"
        )
    if model.longest is not None and ids.shape[-1] > model.longest:
        raise InputError(
            f"{where}: {ids.shape[-1]} tokens, more than the model's {model.longest} positions; cut the texts"
        )


def _tokenised(
    table: Rows, model: Expected, texts: Sequence[str], max_length: int | None, tokenizer: Any
) -> tuple[list[dict[str, Tensor]], Taken]:
    """Texts tokenised by a copy of the tokenizer, which keeps its settings so."""
    cells = [
        [columns.text(value, table.cell(i, name)) for i, value in enumerate(table.column(name))]
        for name in texts
    ]
    if max_length is not None and model.longest is not None and max_length > model.longest:
        raise InputError(f"max_length: {max_length} is more than the model's {model.longest} positions")
    limits = [model.longest, int(getattr(tokenizer, "model_max_length", NO_LIMIT))]
    known = [limit for limit in limits if limit is not None and limit < NO_LIMIT]
    limit = max_length if max_length is not None else min(known, default=None)
    found, cut = tokenise(copy.deepcopy(tokenizer), cells, limit)
    features: list[dict[str, Tensor]] = []
    for number, row in enumerate(found):
        feature = {k: torch.tensor(v) for k, v in row.items() if not model.inputs or k in model.inputs}
        check_tokens(feature["input_ids"].long(), model, f"{table.where}, row {number}")
        if "attention_mask" in model.inputs or not model.inputs:
            feature.setdefault("attention_mask", torch.ones_like(feature["input_ids"]))
        features.append(feature)
    taken = Taken(inputs=list(texts))
    if cut:
        taken.notes.append(f"{cut} of {len(found)} texts were cut to {limit} tokens")
    return features, taken


def _add_labels(
    table: Rows,
    model: Expected,
    features: Sequence[dict[str, Tensor]],
    label: str | None,
    spans: Sequence[str],
    marks: Classes,
    own_loss: bool,
) -> None:
    target = model.label if own_loss else "labels"
    for number, feature in enumerate(features):
        row = table.rows[number]
        for name in spans:
            feature[name] = as_tensor(row.get(name), table.cell(number, name)).long()
        if label is not None:
            feature[target] = read_label(row.get(label), marks, feature, own_loss, table.cell(number, label))
        elif model.kind == "next token":
            mask = feature.get("attention_mask", torch.ones_like(feature["input_ids"]))
            feature[target] = feature["input_ids"].masked_fill(mask == 0, IGNORED)
