"""Data for a checkpoint from whatever a notebook has: loaders, batches, tables, tokenised or plain text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from flatbench.errors import InputError, shown
from flatbench.labels import unwrapped
from flatbench.notebook.examples import (
    LABELS,
    Named,
    Rows,
    Taken,
    as_tensor,
    batches_of,
    check_tokens,
)
from flatbench.notebook.expected import SPAN, Expected, expected
from flatbench.notebook.marks import checked_class
from flatbench.notebook.padding import BATCH_SIZE
from flatbench.seeding import derive_seed

log = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
#: names that batches hold for a loss, and a model need not know
TARGETS = ("targets", *LABELS)


def splits_of(
    data: Any,
    find_tokenizer: Callable[[], Any],
    model: nn.Module,
    device: torch.device,
    named: Named | None = None,
    *,
    own_loss: bool = True,
    seed: int = 0,
    taken: dict[str, Taken] | None = None,
) -> dict[str, list[Batch]]:
    """Split -> batches on a device.

    Args:
        data: one source, which is called ``train``, or a mapping of splits to sources. A source is a data
            loader or another iterable of batches (mappings of tensors, or pairs of inputs and targets), or
            examples: a data set of `datasets` or torch, a pandas DataFrame, or mappings with text or with
            the model's inputs (``input_ids``, ``pixel_values``), and a label.
        find_tokenizer: gives the tokenizer, for texts only; it is copied.
        named: columns and classes that the caller named.
        own_loss: whether the loss is the model's own.
        seed: of the masks of a masked autoencoder.
        taken: is filled with what was taken of each split, which is logged too.

    Raises InputError for a source of no such kind, or an empty one, for columns that must be named, and for
    cells that hold nothing of use.
    """
    if data is None:
        return {}
    sources = dict(data) if isinstance(data, Mapping) else {"train": data}
    _check_splits(sources)
    reader = _Reader(expected(model), find_tokenizer, named or Named(), own_loss, _precision(model))
    found: dict[str, list[Batch]] = {}
    for split, source in sources.items():
        batches, told = reader.read(source, f"data: {split}")
        told.notes += _add_masks(batches, model, reader.model, derive_seed(seed, f"masks of {split}"))
        found[str(split)] = [{k: v.detach().to(device) for k, v in batch.items()} for batch in batches]
        cut = any("were cut" in note for note in told.notes)
        log.log(logging.WARNING if cut else logging.INFO, "data: %s: %s", split, told.describe())
        if taken is not None:
            taken[str(split)] = told
    return found


def _check_splits(sources: Mapping[Any, Any]) -> None:
    if not sources:
        raise InputError("data: a mapping without splits")
    for name, source in sources.items():
        if isinstance(source, Tensor | np.ndarray):
            raise InputError(
                f"data: {name}: a {type(source).__name__}; give batches or examples, as a list: a mapping "
                "is of splits to sources"
            )


def _precision(model: nn.Module) -> torch.dtype:
    """The precision of scores: float64 for a model in it, else float32."""
    kinds = {p.dtype for p in model.parameters()}
    return torch.float64 if kinds == {torch.float64} else torch.float32


class _Reader:
    """Reads the sources of a model's data."""

    def __init__(
        self,
        model: Expected,
        find_tokenizer: Callable[[], Any],
        named: Named,
        own_loss: bool,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.find_tokenizer, self.named = model, find_tokenizer, named
        self.own_loss, self.dtype = own_loss, dtype

    def read(self, source: Any, where: str) -> tuple[list[dict[str, Tensor]], Taken]:
        """The batches of a source, and what was taken."""
        entries, classes, single = _entries(source, where)
        if not entries:
            raise InputError(f"{where}: there are no examples")
        first = entries[0]
        if isinstance(first, Mapping) and (single or _is_example(first)):
            table = Rows(entries, _names(entries, where), classes, where)
            return batches_of(table, self.model, self.named, self.find_tokenizer, self.own_loss, self.dtype)
        if self.named != Named():
            raise InputError(f"{where}: these are batches, of which no columns can be named; give examples")
        if _is_pair(first) and (single or np.ndim(first[1]) == 0):
            entries = [_stack(entries[i : i + BATCH_SIZE], where) for i in range(0, len(entries), BATCH_SIZE)]
        taken = Taken()
        batches = [self._batch(entry, taken, f"{where}, batch {i}") for i, entry in enumerate(entries)]
        taken.inputs = [name for name in batches[0] if name not in (*self.model.labels, *TARGETS)]
        taken.label = ", ".join(n for n in batches[0] if n not in taken.inputs) or None
        taken.examples = sum(next((len(v) for v in b.values() if v.ndim), 1) for b in batches)
        return batches, taken

    def _batch(self, entry: Any, taken: Taken, where: str) -> dict[str, Tensor]:
        if _is_pair(entry):
            inputs, targets = entry
            rest = dict(inputs) if isinstance(inputs, Mapping) else {"inputs": inputs}
            entry = {**rest, "targets": targets}
        if not isinstance(entry, Mapping):
            if isinstance(entry, Tensor | np.ndarray):
                raise InputError(f"{where}: a {type(entry).__name__}; a batch is a pair: [(inputs, targets)]")
            raise InputError(
                f"{where}: a batch is a mapping of tensors or a pair (inputs, targets), not a "
                f"{type(entry).__name__}"
            )
        batch: dict[str, Tensor] = {}
        for key, value in entry.items():
            name = self._name(str(key), entry)
            if name is None or (not isinstance(value, Tensor) and name not in self._columns_to_take):
                taken.unused += [str(key)] if str(key) not in taken.unused else []
                continue
            batch[name] = as_tensor(value, f"{where}: '{key}'")
        if not batch:
            raise InputError(f"{where}: none of {shown(', '.join(map(str, entry)))} is an input of the model")
        self._check(batch, where)
        return batch

    @property
    def _columns_to_take(self) -> set[str]:
        return {*self.model.inputs, *TARGETS, "inputs", "input_ids", "pixel_values", "attention_mask"}

    def _name(self, key: str, entry: Mapping[str, Any]) -> str | None:
        """Under which name a value is handed on; None where the model does not take it."""
        model = self.model
        if (
            self.own_loss
            and key == "label"
            and model.label == "labels"
            and model.labels
            and "labels" not in entry
        ):
            return "labels"  # as transformers' collators do
        if not model.inputs or model.anything or key in model.inputs or key in (*TARGETS, "inputs"):
            return key
        return None

    def _check(self, batch: dict[str, Tensor], where: str) -> None:
        """Raise InputError for tokens and labels that the model has not; bring labels to their precision."""
        model, name = self.model, self.model.label
        ids = batch.get("input_ids")
        if ids is not None:
            check_tokens(ids, model, f"{where}: 'input_ids'")
        sizes = {
            len(v)
            for k, v in batch.items()
            if v.ndim and k in ("input_ids", "pixel_values", "inputs", *TARGETS)
        }
        if len(sizes) > 1:
            raise InputError(f"{where}: inputs and labels of different numbers of rows ({sizes})")
        for place in SPAN if model.kind == "span" and self.own_loss and ids is not None else ():
            if place in batch and int(batch[place].min()) < 0:
                raise InputError(f"{where}: {place} {int(batch[place].min())}; places are counted from 0")
        labels = batch.get(name)
        if labels is None or not self.own_loss:
            return
        if model.kind in ("class", "token", "next token"):
            if labels.is_floating_point():
                raise InputError(f"{where}: '{name}' are {labels.dtype}; classes are whole numbers")
            for number in labels.unique().tolist():
                checked_class(int(number), model.classes, f"{where}: '{name}'")
            batch[name] = labels.long()
        elif model.kind in ("score", "several"):
            if not bool(torch.isfinite(labels.double()).all()):
                raise InputError(f"{where}: '{name}' holds numbers that are missing or infinite")
            batch[name] = labels if labels.is_floating_point() else labels.to(self.dtype)


def _entries(source: Any, where: str) -> tuple[list[Any], dict[str, list[str]], bool]:
    """What a source holds, names of classes by column, and whether each entry is surely one example."""
    if isinstance(source, pd.DataFrame):
        twice = sorted({str(c) for c in source.columns[source.columns.duplicated()]})
        if twice:
            raise InputError(f"{where}: column '{twice[0]}' is there more than once; rename one")
        return source.rename(columns=str).to_dict("records"), {}, True
    if hasattr(source, "to_pylist"):  # Arrow
        return source.to_pylist(), {}, True
    if hasattr(source, "to_dicts"):  # polars
        return source.to_dicts(), {}, True
    features = getattr(source, "features", None)
    if isinstance(features, Mapping) and hasattr(source, "column_names"):  # of `datasets`
        named = {name: list(f.names) for name, f in features.items() if hasattr(f, "str2int") and f.names}
        return list(source), named, True
    if isinstance(source, torch.utils.data.IterableDataset):
        return list(source), {}, True
    if isinstance(source, torch.utils.data.Dataset):
        if not hasattr(source, "__len__"):
            raise InputError(f"{where}: a {type(source).__name__} without a length; give a data loader")
        return [source[i] for i in range(len(source))], {}, True
    if isinstance(source, str | bytes | Tensor | nn.Module) or not isinstance(source, Iterable):
        raise InputError(f"{where}: a {type(source).__name__}; give batches or examples")
    if isinstance(source, Mapping):
        raise InputError(
            f"{where}: a mapping ({shown(', '.join(map(str, source)))}); give batches or examples, as a list"
        )
    return list(source), {}, False


def _names(entries: Sequence[Any], where: str) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise InputError(f"{where}, row {number}: a {type(entry).__name__} among mappings")
        names |= dict.fromkeys(map(str, entry))
    return tuple(names)


def _is_example(entry: Mapping[str, Any]) -> bool:
    """Whether a mapping is one example, and not a batch of them."""
    if any(name in entry and not np.ndim(entry[name]) for name in LABELS):
        return True
    for name, dimensions in (("input_ids", 1), ("pixel_values", 3)):
        if name in entry:
            return _dimensions(entry[name]) <= dimensions
    return not all(isinstance(v, Tensor | np.ndarray) and v.ndim for v in entry.values())


def _dimensions(value: Any) -> int:
    if isinstance(value, list | tuple):
        return 1 + (_dimensions(value[0]) if value else 0)
    return int(np.ndim(value))


def _is_pair(entry: Any) -> bool:
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        return False
    inputs, targets = entry
    number = isinstance(targets, int | float | np.number) and isinstance(inputs, Tensor | np.ndarray)
    return (
        isinstance(targets, Tensor | np.ndarray) and isinstance(inputs, Tensor | np.ndarray | Mapping)
    ) or number


def _stack(pairs: Sequence[Any], where: str) -> tuple[Any, Tensor]:
    """Pairs of one example each as a pair of a batch."""
    try:
        inputs, targets = zip(*pairs, strict=True)
        if isinstance(inputs[0], Mapping):
            raise TypeError("inputs by name; give batches")
        return torch.stack([torch.as_tensor(i) for i in inputs]), torch.stack(
            [torch.as_tensor(t) for t in targets]
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: pairs that make no batch: {shown(error, 200)}") from None


def _add_masks(batches: list[dict[str, Tensor]], model: nn.Module, known: Expected, seed: int) -> list[str]:
    """What masked autoencoders hide of each image, drawn once: by themselves they draw anew in each pass."""
    if "noise" not in known.inputs or known.kind != "none":
        return []
    missing = [i for i, batch in enumerate(batches) if "noise" not in batch and "pixel_values" in batch]
    if not missing:
        return []
    size: Any = getattr(unwrapped(model).config, "patch_size")  # noqa: B009 - not every module has a config
    high, wide = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    for i in missing:
        pixels = batches[i]["pixel_values"]
        patches = (pixels.shape[-2] // high) * (pixels.shape[-1] // wide)
        batches[i]["noise"] = torch.rand(len(pixels), patches, generator=generator).to(pixels.dtype)
    return ["masks drawn once from the seed"]


def described(taken: Mapping[str, Taken]) -> dict[str, str]:
    """Split -> what was taken of it; one line for all where they are alike but for their sizes."""
    alike = {replace(t, examples=0).describe() for t in taken.values()}
    if len(alike) == 1 and len(taken) > 1:
        told = next(iter(taken.values())).describe().partition("; ")[2]
        return {"data": told}
    return {f"data, {split}": t.describe().partition("; ")[2] for split, t in taken.items()}
