"""The loss of a checkpoint and the number of its terms, checked on the data; and the metric that is plain."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.model_state import as_found
from flatbench.errors import InputError, shown
from flatbench.labels import unwrapped
from flatbench.landscape.evaluation.collect import LogitsFunction, logits_of
from flatbench.notebook.data import TARGETS, Batch
from flatbench.notebook.expected import expected
from flatbench.notebook.terms import REJECTED, Count, Probe, Raw, ways
from flatbench.subject.subject import LossFunction

log = logging.getLogger(__name__)

HINT = "give loss=, for example loss=torch.nn.functional.cross_entropy"


def loss_of(model: nn.Module, criterion: Callable[..., Any] | None) -> LossFunction:
    """(model, batch) -> (mean loss, number of terms it is the mean of), by the labels, not yet checked.

    The model's own loss; else ``criterion(outputs, targets)`` for batches that were pairs or have labels:
    the mean over the targets, or this and the number of its terms. ``outputs`` are the logits of a
    transformers model's output, and what any other model gives back.
    """
    return _counting(_raw(criterion), ways(model, criterion is None)[0])


def checked_loss(
    model: nn.Module, criterion: Callable[..., Any] | None, data: Mapping[str, Sequence[Batch]]
) -> tuple[LossFunction, str, Any]:
    """The loss as `loss_of` gives it, checked on rows of the data; what it is a mean of; outputs of a batch.

    What is checked: the model takes the batches, two passes over the same rows give the same loss, and the
    loss of a few rows is the mean of theirs by the number of their terms. Of the ways to count, the first
    of which this is true is taken. The model is left as it was found.

    Raises:
        InputError: the model rejects a batch, computes no loss, draws random numbers, or passes adapted
            layers over; the loss is no mean over terms.
    """
    raw = _raw(criterion)
    counts = ways(model, criterion is None)
    if not data:
        return _counting(raw, counts[0]), counts[0].name, None
    known = expected(model)
    first = next(iter(data.values()))[0]
    unread = [n for n in (*TARGETS, "inputs") if n in first and known.inputs and n not in known.inputs]
    if criterion is None and unread:
        raise InputError(
            f"the model ({type(unwrapped(model)).__name__}) takes no {' and no '.join(unread)}, and "
            f"computes no loss from these batches; {HINT}"
        )
    with as_found(model), torch.no_grad():
        probe = Probe(model, raw, data)
        outputs = probe.try_out()
        agreed = probe.agreed(counts)
        padding = "; it depends on the padding of the batches" if probe.reads_padding() else ""
    log.log(logging.WARNING if padding else logging.INFO, "loss: mean over %s%s", agreed.name, padding)
    return _counting(raw, agreed), agreed.name + padding, outputs


# -- the loss ---------------------------------------------------------------------------------------------


def _raw(criterion: Callable[..., Any] | None) -> Raw:
    def own(model: nn.Module, batch: Batch) -> tuple[Tensor, int | None, Any]:
        with losses_in_float32(model):
            outputs = model(**batch)
        return _own_loss(model, outputs), None, outputs

    def given(model: nn.Module, batch: Batch) -> tuple[Tensor, int | None, Any]:
        assert criterion is not None
        key = _target(batch)
        rest = {k: v for k, v in batch.items() if k != key}
        outputs = model(rest["inputs"]) if set(rest) == {"inputs"} else model(**rest)
        logits = getattr(outputs, "logits", None)  # of a transformers output
        try:
            with losses_in_float32(model):
                found = criterion(logits if isinstance(logits, Tensor) else outputs, batch[key])
        except REJECTED as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"loss=: fails on what the model gives back ({_shape(outputs)}) and '{key}' "
                f"{tuple(batch[key].shape)}: {type(error).__name__}: {shown(error, 200)}"
            ) from error
        if isinstance(found, tuple | list):
            if len(found) != 2:
                raise InputError(f"loss=: gives {len(found)} values; give the mean loss, or it and its terms")
            return _one(found[0], "loss="), _terms(found[1]), outputs
        return _one(found, "loss="), None, outputs

    return own if criterion is None else given


def _counting(raw: Raw, count: Count) -> LossFunction:
    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        value, terms, _ = raw(model, batch)
        return value, count.of(batch) if terms is None else terms

    return loss


def _target(batch: Batch) -> str:
    key = next((k for k in TARGETS if k in batch), None)
    if key is None:
        raise InputError("loss=: the batches hold neither targets nor labels to compare with")
    return key


def _own_loss(model: nn.Module, outputs: Any) -> Tensor:
    """The loss in what a model gives back: of that name, or the only single number of a tuple."""
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None and isinstance(outputs, tuple | list):
        single = [o for o in outputs if isinstance(o, Tensor) and o.ndim == 0 and o.is_floating_point()]
        named = hasattr(outputs, "_fields")
        if len(single) == 1 and not named:
            found = single[0]
    if found is None and isinstance(outputs, Tensor) and outputs.ndim == 0:
        found = outputs
    if not isinstance(found, Tensor):
        raise InputError(
            f"the model gives no loss for these batches ({_shape(outputs)}); they need labels, or {HINT}"
        )
    return _one(found, "the model's loss")


def _one(found: Any, what: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise InputError(f"{what}: a {type(found).__name__}, not a tensor")
    if found.numel() != 1:
        raise InputError(f"{what}: must be one number, the mean, not of shape {tuple(found.shape)}")
    return found.reshape(())


def _terms(found: Any) -> int:
    number = float(found) if isinstance(found, Tensor | int | float) else float("nan")
    if not number.is_integer() or number < 0:
        raise InputError(f"loss=: its number of terms is {shown(found)}; it must be a whole number")
    return int(number)


def _shape(outputs: Any) -> str:
    """A model's output in a few words."""
    if isinstance(outputs, Tensor):
        return f"a tensor {tuple(outputs.shape)}"
    names = (
        list(outputs)
        if isinstance(outputs, Mapping)
        else range(len(outputs))
        if isinstance(outputs, tuple)
        else []
    )
    return f"a {type(outputs).__name__}" + (f" with {', '.join(map(str, names))}" if names else "")


# -- the metric -------------------------------------------------------------------------------------------


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the examples whose largest logit is that of their label.

    A negative label is no class and does not count, whichever number the loss ignores."""
    kept = labels >= 0
    return {"accuracy": float((logits.argmax(-1) == labels)[kept].double().mean())}


def metric_of(data: Mapping[str, Sequence[Batch]], outputs: Any) -> LogitsFunction | None:
    """Accuracy where labels are classes of examples and the model gives logits of them; nothing is guessed.

    Args:
        outputs: what the model gives back for a batch.
    """
    try:
        logits = logits_of([outputs])
    except InputError:
        return None
    if logits.ndim != 2 or logits.shape[1] < 2:
        return None
    for batches in data.values():
        for batch in batches:
            labels = next((batch[k] for k in TARGETS if k in batch), None)
            if labels is None or labels.ndim != 1 or labels.is_floating_point():
                return None
    return accuracy if data else None
