"""The low-rank factors of a peft model, and what of a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import peft
from peft.tuners.lora import LoraLayer
from torch import nn

from flatbench.curvature.operators.spaces import plain_name
from flatbench.errors import InputError

Kind = Literal["linear", "convolution", "embedding"]


@dataclass(frozen=True)
class LoRAFactors:
    """One adapted weight ``W = W0 + scaling * B @ A``, W being ``(n, m)``: outputs by inputs.

    A convolution's W is its kernel as ``(n, channels·height·width)``, and its factors are kernels too, to be
    flattened from the second dimension on. W of an embedding is ``(dimensions, words)``, the transpose of
    what torch stores.

    Attributes:
        name: the adapted module's name in the model.
        A: parameter of shape ``(r, m)``, or ``(r, channels, height, width)`` of a convolution.
        B: parameter of shape ``(n, r)``, or ``(n, r, 1, 1)``; zeros at the start unless the initialisation
            says else. In an embedding it is A that starts with zeros.
        layer: peft's layer, which owns the scaling.
        adapter: peft's name of the adapter.
        kind: what the module is; Conv1D of GPT-2 counts as linear.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    layer: LoraLayer
    adapter: str
    kind: Kind = "linear"

    @property
    def scaling(self) -> float:
        """``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA), read from peft's layer, never recomputed."""
        return float(self.layer.scaling[self.adapter])


def lora_factors(model: nn.Module) -> list[LoRAFactors]:
    """The low-rank factors of every active adapter of a peft model of which A or B trains, in module order.

    Factors that share their storage with earlier ones (of tied weights) are listed once.

    Raises InputError for an adapted module whose adapter is no product of two matrices.
    """
    found: list[LoRAFactors] = []
    seen: set[tuple[int, int]] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            factors = _factors(name, module, adapter)
            if factors is None or not (factors.A.requires_grad or factors.B.requires_grad):
                continue
            # 0 of tensors without memory, which share none
            A, B = (p.untyped_storage().data_ptr() or id(p) for p in (factors.A, factors.B))
            # a head tied to an embedding holds the embedding's A as its B
            if (A, B) in seen or (B, A) in seen:
                continue
            seen.add((A, B))
            found.append(factors)
    return found


def _factors(name: str, module: LoraLayer, adapter: str) -> LoRAFactors | None:
    """What ``adapter`` is on ``module``; None if it is not there."""
    if adapter in module.lora_embedding_A:
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return LoRAFactors(name, A, B, module, adapter, "embedding")
    if adapter not in module.lora_A:
        return None
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    grouped = getattr(module.get_base_layer(), "groups", 1) > 1
    if getattr(module, "num_experts", 1) > 1 or grouped:
        what = "grouped convolutions" if grouped else "stacked experts"
        raise InputError(
            f"{name} ({type(module).__name__}): the adapter of {what} is no product B·A of two matrices; "
            "leave this module out of target_modules"
        )
    return LoRAFactors(name, A, B, module, adapter, "linear" if A.ndim == 2 else "convolution")


def adapted_modules(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names, in the base model, of the modules that an adapter with ``target_modules`` treats.

    They span the ``merged`` space, for a model with no adapter as well.
    """
    if isinstance(model, peft.PeftModel):
        # wrappers may be nested around one module, one for each of its parameters
        names = [plain_name(name) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
        return list(dict.fromkeys(names))
    return [
        name
        for name, _ in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    ]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
