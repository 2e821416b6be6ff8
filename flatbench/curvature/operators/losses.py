"""Losses in single precision at least, and those of models in the manner of transformers with their terms."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flatbench.errors import InputError
from flatbench.labels import count_terms, puts_tokens_before, shifts

#: types in which a loss of 2 comes in steps of 1/64 (bfloat16) and 1/512 (float16)
HALF = (torch.float16, torch.bfloat16)

#: what torch's autocast takes in float32 as well, where it casts at all
_LOSSES = {
    functional.cross_entropy, functional.nll_loss, functional.mse_loss, functional.l1_loss,
    functional.smooth_l1_loss, functional.huber_loss, functional.kl_div, functional.binary_cross_entropy,
    functional.binary_cross_entropy_with_logits, functional.log_softmax, functional.cosine_embedding_loss,
    functional.margin_ranking_loss, functional.multi_margin_loss, functional.multilabel_margin_loss,
    functional.multilabel_soft_margin_loss, functional.soft_margin_loss, functional.hinge_embedding_loss,
    functional.gaussian_nll_loss, functional.poisson_nll_loss, functional.triplet_margin_loss,
    torch.log_softmax, Tensor.log_softmax, torch.logsumexp, Tensor.logsumexp,
}  # fmt: skip


class _InFloat32(TorchFunctionMode):
    """Calls losses with what is in half precision raised to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LOSSES and "dtype" not in kwargs:
            args = [_in_float32(value) for value in args]
            kwargs = {key: _in_float32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def device_types(model: nn.Module) -> set[str]:
    """Where a model's weights are; those that are away are computed with where others are, or on the CPU."""
    found = {p.device.type for p in model.parameters()}
    return found - {"meta"} or ({"cpu"} if found else found)


def computes_in_half(model: nn.Module) -> bool:
    """Whether half precision takes part: in a parameter, by autocast, or by accelerate's."""
    if "_original_forward" in vars(model):  # accelerate has put autocast in its place
        return True
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()):
        return True
    return any(torch.is_autocast_enabled(device) for device in device_types(model))


#: what `computes_in_half` was found to be, inside of `precision_known`
_KNOWN: ContextVar[bool | None] = ContextVar("precision_known", default=None)


@contextlib.contextmanager
def precision_known(half: bool | None) -> Iterator[None]:
    """Inside, `losses_in_float32` takes ``half`` for what `computes_in_half` says of the model, unless None.

    For a training step, whose model stays what it is: to ask all parameters anew takes a tenth of a small
    model's step.
    """
    token = _KNOWN.set(half)
    try:
        yield
    finally:
        _KNOWN.reset(token)


@contextlib.contextmanager
def losses_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, losses of logits in half precision are taken in float32: torch's own, and log-softmax.

    The logits are what they are. A mean loss in bfloat16 would come in steps of 1/128 of itself.
    """
    known = _KNOWN.get()
    with _InFloat32() if (computes_in_half(model) if known is None else known) else contextlib.nullcontext():
        yield


def transformers_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """``model(**batch).loss`` and how many terms it is the mean of.

    The terms are told by `flatbench.labels`. What transformers' Trainer puts into a batch to divide by,
    ``num_items_in_batch``, is left out. Raises InputError for a batch without ``labels``.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"a batch is a {type(batch).__name__}, and no mapping of the model's inputs: give loss=, which "
            "takes the model and a batch, and returns the mean loss and the number of its terms"
        )
    batch = {name: value for name, value in batch.items() if name != "num_items_in_batch"}
    if "labels" not in batch:
        raise InputError(
            f"the batches ({', '.join(batch)}) hold no 'labels', by which the terms of a loss are counted; "
            "give loss=, which returns the mean loss and the number of its terms"
        )
    with losses_in_float32(model):
        loss: Tensor = model(**batch).loss
    labels: Tensor = batch["labels"]
    return loss, count_terms(labels, shifts(model) and not puts_tokens_before(model))


def checked(found: Any, rows: int) -> tuple[Tensor, int]:
    """What a loss function returned: a loss ``()``, and the number of its terms.

    Args:
        rows: the terms where none are told.

    Raises InputError for what is no loss, and for what is no number of terms.
    """
    if isinstance(found, tuple) and len(found) != 2:
        raise InputError(
            f"a loss returns (mean loss, number of its terms) or the loss, not {len(found)} values"
        )
    loss, terms = found if isinstance(found, tuple) else (found, rows)
    if not isinstance(loss, Tensor):
        raise InputError(
            f"a loss returns (mean loss, number of its terms) or the loss, a tensor; this is a "
            f"{type(loss).__name__}, {loss!r:.60}"
        )
    if loss.numel() != 1:
        raise InputError(f"the loss must be one number, not of shape {tuple(loss.shape)}")
    count = float(terms)
    if not count.is_integer() or count < 0:
        raise InputError(f"a loss says that it is the mean of {count:g} terms, which is no number of terms")
    return loss.reshape(()), int(count)
