"""A model lent out for measuring and given back exactly as it was found."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatbench.curvature.operators.adapters import steady
from flatbench.errors import InputError

_ONE_THREAD = threading.RLock()


@contextlib.contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards all is as before.

    What is put back: modes, ``requires_grad``, gradients, buffers, and the random state of the CPU and, where
    they are in use, of the GPUs. Adapters beneath torch's MultiheadAttention are at work inside, see
    `flatbench.curvature.operators.adapters.steady`.
    """
    with steady(model), _restore(model):
        yield


@contextlib.contextmanager
def _restore(model: nn.Module) -> Iterator[None]:
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=gpus):
        try:
            model.eval()
            for parameter, _, _ in parameters:
                parameter.grad = None
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad, gradient in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, old in buffers:
                    buffer.copy_(old)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Inside, no other thread of the process is; a thread may enter again."""
    if not _ONE_THREAD.acquire(blocking=False):
        raise InputError(
            "another thread of this process is measuring curvature: what torch switches for it holds for all "
            "threads; measure one after the other, or in processes"
        )
    try:
        yield
    finally:
        _ONE_THREAD.release()


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention in plain operations: torch's fused kernels have no second derivative, on CPUs either.

    torch's own ``scaled_dot_product_attention`` is told to use them; models in the manner of transformers
    that call another kernel are switched to ``eager``, and back.

    Raises InputError while another thread is inside: torch's switches, and forward mode, are of the process.
    """
    found: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        kind = getattr(config, "_attn_implementation", None)
        if kind not in (None, "eager", "sdpa"):
            found[id(config)] = (config, kind)
    try:
        for config, _ in found.values():
            config._attn_implementation_internal = "eager"
        with _alone(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, kind in found.values():
            config._attn_implementation_internal = kind
