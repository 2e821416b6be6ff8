"""The low-rank factors of a peft model, and what of a model trains."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import peft
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from flatbench.curvature.operators import adapters, spaces
from flatbench.curvature.operators.spaces import plain_name
from flatbench.errors import InputError, NotApplicableError

Kind = Literal["linear", "convolution", "embedding", "parameter"]


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
        kind: what the module is; Conv1D of GPT-2 counts as linear. ``parameter`` is one that peft adapts
            where it lies (``target_parameters``, and the input projection of MultiheadAttention): W is it as
            it is stored, whatever the module does with it.
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


def _differs(base: Any) -> str | None:
    """In what the convolutions that peft makes for an adapter are unlike the layer's, beside groups."""
    padding, dilation = getattr(base, "padding_mode", "zeros"), getattr(base, "dilation", ())
    if padding != "zeros":
        return f"the layer's padding is {padding} and its adapter's zeros"
    if any(d > 1 and k > 1 for d, k in zip(dilation, getattr(base, "kernel_size", ()), strict=True)):
        return f"the layer's dilation is {dilation} and its adapter has none"
    return None


def measured_factors(model: nn.Module) -> list[LoRAFactors]:
    """What `lora_factors` gives and frozen factors, which are no less a part of what is measured.

    Raises NotApplicableError where that raises InputError.
    """
    try:
        return lora_factors(model, frozen=True)
    except InputError as error:
        raise NotApplicableError(str(error)) from error


def lora_factors(model: nn.Module, frozen: bool = False) -> list[LoRAFactors]:
    """The low-rank factors of every active adapter of a peft model of which A or B trains, in module order.

    Args:
        frozen: those of which neither trains, too.

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
            if factors is None or not (frozen or factors.A.requires_grad or factors.B.requires_grad):
                continue
            A, B = _memory(factors.A), _memory(factors.B)
            # a head tied to an embedding holds the embedding's A as its B
            if (A, B) in seen or (B, A) in seen:
                continue
            seen.add((A, B))
            found.append(factors)
    return found


def _memory(parameter: Tensor) -> int:
    """Equal for parameters on one storage; tensors without memory (shapes, parts of shards) share none."""
    if type(parameter) is not nn.Parameter or parameter.device.type == "meta":
        return id(parameter)
    return parameter.untyped_storage().data_ptr() or id(parameter)


def _factors(name: str, module: LoraLayer, adapter: str) -> LoRAFactors | None:
    """What ``adapter`` is on ``module``; None if it is not there."""
    if adapter in module.lora_embedding_A:
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return LoRAFactors(name, A, B, module, adapter, "embedding")
    if adapter not in module.lora_A:
        return None
    if isinstance(module.lora_A[adapter], nn.Parameter):
        raise InputError(
            f"{name} ({type(module).__name__}): the adapter of AdaLoRA is B·diag(E)·A, and no product of two "
            "matrices; use LoRA"
        )
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    base: Any = module.get_base_layer()
    other = _differs(base)
    if other is not None:
        raise InputError(
            f"{name} ({type(module).__name__}): {other}, so that the adapter is no change of the layer's "
            "weight; leave this module out of target_modules"
        )
    grouped = getattr(base, "groups", 1) > 1
    if getattr(module, "num_experts", 1) > 1 or grouped:
        what = "grouped convolutions" if grouped else "stacked experts"
        raise InputError(
            f"{name} ({type(module).__name__}): the adapter of {what} is no product B·A of two matrices; "
            "leave this module out of target_modules"
        )
    if isinstance(module, MultiheadAttention | ParamWrapper):
        return LoRAFactors(name, A, B, module, adapter, "parameter")
    return LoRAFactors(name, A, B, module, adapter, "linear" if A.ndim == 2 else "convolution")


def refuse_attention(method: str, model: nn.Module, *, doubled_only: bool = False) -> None:
    """Raise InputError if torch's MultiheadAttention is adapted: neither hook nor copy can move its W.

    Args:
        doubled_only: only where it computes with another multiple of B·A than its scaling, see
            `flatbench.curvature.operators.adapters.adds_twice`.
    """
    for name, layer in adapters.attentions(model).items():
        if not doubled_only:
            raise InputError(
                f"{method}: {name} (MultiheadAttention): peft makes its weights anew in each call, and calls "
                "no layer of them; leave the module out of target_modules"
            )
        if adapters.adds_twice(layer):
            raise InputError(
                f"{method}: {name} (MultiheadAttention): this version of peft adds the adapter of its output "
                "twice and its gradient once, so that no radius in W can be kept; leave the module out of "
                "target_modules"
            )


def adapted_modules(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names, in the base model, of the modules that an adapter with ``target_modules`` treats.

    They span the ``merged`` space, for a model with no adapter as well.
    """
    # adapters are also put into models without a wrapper around them (transformers' add_adapter), and layers
    # may be nested around one module, one for each of its parameters
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if layers or isinstance(model, peft.PeftModel):
        used = [name for name, layer in layers.items() if adapters.has_adapter_in_use(layer)]
        return list(dict.fromkeys(map(plain_name, used)))
    return [
        plain_name(name)
        for name, _ in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    ]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_holders(model: nn.Module) -> Callable[[Tensor], list[tuple[str, nn.Module]]]:
    """Tells the places of a parameter's numbers in a model: names, with the modules that hold it.

    A module that is called beside its adapter, too, is a place of its own.
    """
    together: dict[Hashable, list[spaces.Slot]] = {}
    for place in spaces.slots(model):
        together.setdefault(spaces.memory_of(place.parameter), []).append(place)

    def holders(parameter: Tensor) -> list[tuple[str, nn.Module]]:
        found = together.get(spaces.memory_of(parameter), [])
        # what peft wraps in one place and not in another
        apart = len({(id(place.module), place.adapted) for place in found}) > len(
            {id(p.module) for p in found}
        )
        return [(p.name, p.module if p.adapted or not apart else nn.Identity()) for p in found]

    return holders
