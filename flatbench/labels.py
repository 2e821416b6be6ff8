"""Labels and the terms of a loss: what -100 means, which labels are shifted, and how many terms count.

A loss of transformers is a mean over terms: the labels that are not `IGNORED`. A language model that predicts
each next token has its logits one place before the labels they predict, so that the first label of a row is
no term. Whether a model does so it says itself, by the loss function that it calls and its configuration.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

from torch import Tensor, nn

#: the label that the losses of transformers and torch leave out
IGNORED = -100

#: what wraps a model and calls it: torch.compile, (distributed) data parallel and DeepSpeed, FSDP
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")
#: variables of a forward pass that shifts by itself, in all of transformers and in code modelled on it
_SHIFT_VARIABLES = {"shift_labels", "shift_logits"}
#: peft's kinds of prompts that are no tokens of the sequence
_IN_THE_CACHE = {"PREFIX_TUNING", "CARTRIDGE"}
#: names of a forward pass that computes its loss by itself
_LOSSES = {"CrossEntropyLoss", "cross_entropy", "NLLLoss", "nll_loss"}


def counted(labels: Tensor) -> Tensor:
    """Which class labels are terms of a loss: a tensor of truth values, of their shape."""
    return labels != IGNORED


def aligned(labels: Tensor, shifted: bool) -> Tensor:
    """The labels ``(N, T)`` that are predicted: without the first of a row, ``(N, T - 1)``, if shifted."""
    return labels[:, 1:] if shifted and labels.ndim > 1 else labels


def count_terms(labels: Tensor, shifted: bool) -> int:
    """How many terms the mean loss over these labels has.

    Args:
        labels: classes of examples ``(N,)`` or of tokens ``(N, T)``; scores ``(N,)`` or ``(N, k)``, of which
            each example is a term.
        shifted: whether the model predicts each next token, see `shifts`.
    """
    if labels.is_floating_point():
        return len(labels)
    return int(counted(aligned(labels, shifted)).sum())


def shifts(model: nn.Module) -> bool:
    """Whether the loss of a model compares its logits at a place with the label at the next one.

    Encoder-decoders do not: their decoder's input is what is shifted. Of other models those do whose forward
    pass calls a ``loss_function`` that shifts (transformers gives a model one by its ``loss_type``), or that
    shift by themselves. Adapters, compilation and data parallelism around the model change nothing, nor does
    the name of a subclass.
    """
    inner: Any = unwrapped(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return False
    for kind in type(inner).__mro__:
        forward = vars(kind).get("forward")
        code = getattr(inspect.unwrap(forward), "__code__", None) if forward else None
        if code is None:
            continue
        names = _names(code)
        if names & _SHIFT_VARIABLES:
            return True
        if "loss_function" in names:
            return _shifts_by_itself(inner)
        if names & _LOSSES:
            return False
    # a model that leaves the loss to one of its parts: transformers' loss type is the best word there is
    if getattr(inner, "loss_type", None) is not None:
        return _shifts_by_itself(inner)
    parts = (part for part in inner.modules() if part is not inner)
    within = next((part for part in parts if getattr(part, "loss_type", None) is not None), None)
    return within is not None and shifts(within)


def puts_tokens_before(model: nn.Module) -> bool:
    """Whether peft puts virtual tokens before each row, so that a row's first label is a term after all."""
    outer: Any = model
    while not hasattr(outer, "get_base_model"):
        inner = _within_wrapper(outer)
        if inner is None:
            return False
        outer = inner
    config = getattr(outer, "active_peft_config", None)
    learns = bool(getattr(config, "is_prompt_learning", False))
    # prefix tuning's are in the cache of keys and values, without labels
    return learns and getattr(config, "peft_type", None) not in _IN_THE_CACHE


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of adapters (peft), compilation and data parallelism."""
    while True:
        wrapped: Any = model
        inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else _within_wrapper(model)
        if inner is None or inner is model:
            return model
        model = inner


def _within_wrapper(model: nn.Module) -> nn.Module | None:
    """The model that compilation or parallel training wraps; None where nothing does."""
    return next((inner for name, inner in model.named_children() if name in _WRAPPERS), None)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` or data parallelism wraps: the same weights and the same function."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        # not by getattr, by which peft's wrappers answer for the model within
        inner = model.module if isinstance(model, wrappers) else model._modules.get("_orig_mod")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _names(code: CodeType) -> set[str]:
    return {*code.co_names, *code.co_varnames}


def _shifts_by_itself(model: Any) -> bool:
    """Whether the loss function of a transformers model shifts the labels that it is given."""
    function = getattr(model, "loss_function", None)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    return code is not None and bool(_names(code) & _SHIFT_VARIABLES)
