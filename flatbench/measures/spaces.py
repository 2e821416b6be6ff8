"""The parameter spaces in which a trained model is measured, lent out and given back untouched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import Subject

#: ``adapter``: LoRA's A and B. ``merged``: the full weights ``W0 + s·B·A`` of the adapted modules, the same
#: weights for a fully fine-tuned model. ``all``: every weight of the merged model.
Space = Literal["adapter", "merged", "all"]


@dataclass(frozen=True)
class Point:
    """A model in evaluation mode and those of its parameters that span a space.

    Attributes:
        model: only the spanning parameters require gradients, and none holds one.
        parameters: the spanning parameters by their name in ``model``, in the model's order.
        owners: the module that holds each parameter, by the parameter's name.
    """

    space: Space
    model: nn.Module
    parameters: dict[str, nn.Parameter]
    owners: dict[str, nn.Module]

    @property
    def dimension(self) -> int:
        """Number of scalars in the space."""
        return sum(p.numel() for p in self.parameters.values())

    def describe(self) -> dict[str, Any]:
        """The result entries that say where a measurement was taken."""
        kinds = {str(p.dtype).removeprefix("torch.") for p in self.parameters.values()}
        return {"space": self.space, "dimension": self.dimension, "precision": ", ".join(sorted(kinds))}

    @contextlib.contextmanager
    def moved(self, step: Sequence[Tensor], scale: float = 1.0) -> Iterator[None]:
        """Inside, the weights are at ``w + scale · step``; afterwards they hold the bits of before.

        Args:
            step: a tensor for each parameter, of its shape.
        """
        parameters = list(self.parameters.values())
        saved = [p.detach().clone() for p in parameters]  # subtracting what was added would drift
        try:
            with torch.no_grad():
                for parameter, part in zip(parameters, step, strict=True):
                    parameter.add_(part, alpha=scale)
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(parameters, saved, strict=True):
                    parameter.copy_(old)


@contextlib.contextmanager
def in_space(subject: Subject, space: Space, *, twice_differentiable: bool = False) -> Iterator[Point]:
    """Lend the subject's model out in one space.

    On the way out, by an exception as well, the subject's model is bit for bit as it was found: parameters,
    buffers, modes, ``requires_grad``, gradients, attention; so is the random state of the CPU and the GPUs.

    Args:
        twice_differentiable: use an attention that has second derivatives (torch's fused ones have none).

    Raises:
        NotApplicableError: the model has no such space.
        InputError: ``subject.adapted`` names a module that the model lacks.
    """
    _check_applicable(subject, space)
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=gpus))
        model = subject.model
        if isinstance(model, peft.PeftModel) and space != "adapter":
            model = merged_copy(model)
        stack.enter_context(_as_found(model))
        if twice_differentiable:
            stack.enter_context(_plain_attention(model))
        yield _point(model, space, subject.adapted)


def merged_copy(model: peft.PeftModel) -> nn.Module:
    """A copy of the base model whose adapted weights are ``W0 + s·B·A``; the original is not touched.

    Raises FlatbenchError if a merged weight is not finite.
    """
    try:
        merged: nn.Module = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft's words for weights that are not finite
        raise FlatbenchError(f"the adapter cannot be merged: {error}") from error
    return merged


def _check_applicable(subject: Subject, space: Space) -> None:
    adapted = any(isinstance(module, LoraLayer) for module in subject.model.modules())
    if space == "adapter" and not adapted:
        raise NotApplicableError("the model has no adapter")
    if space == "merged" and not subject.adapted:
        raise NotApplicableError("no adapted modules are named, so the merged space is empty")
    if space != "adapter" and isinstance(subject.model, peft.PeftModel) and not adapted:
        raise NotApplicableError("the adapter is not LoRA and has no merged weights")


def _point(model: nn.Module, space: Space, adapted: Sequence[str]) -> Point:
    """Choose the space's parameters and let gradients reach no others."""
    wanted = {id(p) for p in _spanning(model, space, adapted)}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise NotApplicableError(f"{name} is quantized ({parameter.dtype})")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in parameters}
    return Point(space, model, parameters, owners)


def _spanning(model: nn.Module, space: Space, adapted: Sequence[str]) -> Iterator[nn.Parameter]:
    if space == "all":
        yield from model.parameters()
    elif space == "adapter":
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                for adapter in layer.active_adapters:
                    for factors in (layer.lora_A, layer.lora_B):
                        if adapter in factors:
                            yield from factors[adapter].parameters()
                    for matrices in (layer.lora_embedding_A, layer.lora_embedding_B):
                        if adapter in matrices:
                            yield matrices[adapter]
    else:
        for name in adapted:
            try:
                yield model.get_submodule(name).get_parameter("weight")
            except AttributeError as error:
                raise InputError(f"adapted module '{name}': {error}") from error


@contextlib.contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; modes, gradients and buffers put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
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
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention in plain operations: torch's fused kernels have no second derivative, on CPUs either.

    torch's own ``scaled_dot_product_attention`` is told to use them; transformers models that call another
    kernel are switched to ``eager``, and back.
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
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, kind in found.values():
            config._attn_implementation_internal = kind
