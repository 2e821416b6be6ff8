"""Low-rank adapted layers, recognised by their shape, and the weights that they add to.

The shape is that of peft's layers: a module with ``base_layer``, ``lora_A``, ``lora_B`` and ``merge``.
Nothing of peft is imported. What is adapted need not be ``base_layer.weight``: it may be a parameter by
another name (``target_parameters``), or the input projection of torch's MultiheadAttention.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from flatbench.errors import FlatbenchError, NotApplicableError

#: containers of factors in a layer: LoRA's, its embeddings' and AdaLoRA's singular values
FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_E")


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a low-rank adapter around another layer."""
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "merge"))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The low-rank adapted layers by name."""
    return {name: module for name, module in model.named_modules() if is_adapted(module)}


def has_adapter_in_use(layer: Any) -> bool:
    """Whether an adapter that is active, or was merged in, is on a layer: peft's wrapper also stays around
    layers that only another adapter has, or one that was deleted."""
    used = {*layer.active_adapters, *layer.merged_adapters}
    return any(name in getattr(layer, held, {}) for held in FACTORS for name in used)


def layers_in_use(model: nn.Module) -> dict[str, Any]:
    """The adapted layers whose adapters are in use, by name: those of the space ``merged``."""
    return {name: layer for name, layer in adapted_layers(model).items() if has_adapter_in_use(layer)}


def base_of(layer: Any) -> tuple[nn.Module, nn.Module]:
    """The innermost layer beneath an adapter, and the wrapper right around it (wrappers may be nested)."""
    around, base = layer, layer.base_layer
    while hasattr(base, "base_layer"):
        around, base = base, base.base_layer
    return base, around


def weight_key(layer: Any) -> str:
    """What the adapted parameter is called in the innermost layer."""
    named = getattr(layer, "parameter_name", None)
    if named is not None:
        return str(named)
    return "in_proj_weight" if isinstance(base_of(layer)[0], nn.MultiheadAttention) else "weight"


def working_adapters(layer: Any) -> list[str]:
    """The adapters that add to a layer's weight when it is called."""
    if layer.merged or getattr(layer, "disable_adapters", False):
        return []
    held = [getattr(layer, name, {}) for name in ("lora_A", "lora_embedding_A")]
    return [name for name in layer.active_adapters if any(name in each for each in held)]


def replaced_keys(layer: Any) -> list[str]:
    """Which parameters of the innermost layer `merged` replaces: none where no adapter is at work."""
    adapters = working_adapters(layer)
    if not adapters:
        return []
    with_bias = any(getattr(layer, "lora_bias", {}).get(name) for name in adapters)
    with_bias = with_bias and "bias" in base_of(layer)[0]._parameters  # an attention's is that of its output
    return [weight_key(layer), *(["bias"] if with_bias else [])]


def refuse_detached(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Raise NotApplicableError if a factor of DoRA is among the parameters.

    DoRA takes the norms of its rows for constants in the backward pass (Liu et al. 2024, Section 4.3), so
    that its gradient is not that of the loss, and has no symmetric derivative.
    """
    chosen = {id(parameter) for parameter in parameters}
    for name, layer in adapted_layers(model).items():
        variants = getattr(layer, "lora_variant", {})
        for adapter in working_adapters(layer):
            if "dora" not in type(variants.get(adapter)).__name__.lower():
                continue
            factors = [getattr(layer, key, {}) for key in FACTORS]
            held = [each[adapter] for each in factors if adapter in each]
            own = [p for x in held for p in ([x] if isinstance(x, torch.Tensor) else x.parameters())]
            if any(id(p) in chosen for p in own):
                raise NotApplicableError(
                    f"{name}: DoRA takes the norms of its rows for constants in the backward pass, so that "
                    "its gradient has no Hessian in A and B; measure in the space 'merged'"
                )


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, every adapted layer computes with ``W0 + s·B·A`` as one weight of its own.

    The frozen parameters are taken out of their layers and put back, the same objects, never written to. So
    layers that share a weight (tied embeddings, replicated layers) are untied inside, each with the sum of
    the weight and of its own adapter, which is what they compute with outside. Layers that are merged
    already stay so; those whose adapters are disabled have nothing to merge.

    Raises:
        NotApplicableError: an adapter cannot be merged.
        FlatbenchError: a merged weight is not finite.
    """
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    within: set[int] = set()  # output projections, which their attention's layer merges
    with contextlib.ExitStack() as stack:
        for name, layer in adapted_layers(model).items():
            if id(layer) in within or not replaced_keys(layer):
                continue
            base, _ = base_of(layer)
            if _is_attention(layer):
                within.add(id(base.out_proj))
                stack.enter_context(_merged_attention(layer))
            else:
                stack.enter_context(_lend_merged(name, layer, used_elsewhere=uses[id(base)] > 1))
        yield


@contextlib.contextmanager
def _lend_merged(name: str, layer: Any, used_elsewhere: bool) -> Iterator[None]:
    keys = replaced_keys(layer)
    base, around = base_of(layer)
    check_mergeable(name, layer)
    own: nn.Module = base
    if used_elsewhere:  # a module that is called beside its adapter, too, keeps its weight there
        own = around._modules["base_layer"] = copy.copy(base)
        own._parameters = dict(base._parameters)
    originals = dict(own._parameters)
    adapters, caches = list(layer.merged_adapters), dict(getattr(layer, "_caches", {}))
    # a parameter of a type of its own (quantised) belongs to its layer, which replaces it or its data
    special = [(p, p.data) for p in originals.values() if p is not None and type(p) is not nn.Parameter]
    try:
        for key in keys:
            frozen = own._parameters[key]
            if type(frozen) is nn.Parameter:
                own._parameters[key] = nn.Parameter(frozen.data, requires_grad=False)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:  # peft's words for weights that are not finite
            raise FlatbenchError(f"{name}: the adapter cannot be merged: {error}") from error
        except (NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotApplicableError(
                f"{_label(name, layer)}: the adapter cannot be merged: {error}; measure in the space "
                "'adapter'"
            ) from error
        yield
    finally:
        own._parameters.clear()
        own._parameters.update(originals)
        for parameter, data in special:
            parameter.data = data
        if own is not base:
            around._modules["base_layer"] = base
        layer.merged_adapters[:] = adapters
        if hasattr(layer, "_caches"):
            layer._caches.clear()
            layer._caches.update(caches)


def check_mergeable(name: str, layer: Any) -> None:
    """Raise NotApplicableError for a layer whose adapters at work cannot be merged into its parameters."""
    base, _ = base_of(layer)
    for key in replaced_keys(layer):
        if base._parameters.get(key) is None:
            missing = getattr(base, key, None) is None
            why = "is missing" if missing else "is computed (parametrized, normed)"
            raise NotApplicableError(
                f"{_label(name, layer)}: its {key} {why}, and no adapter can be merged into it; measure in "
                "the space 'adapter'"
            )


def _label(name: str, layer: Any) -> str:
    return f"{name} ({type(layer).__name__})"


# -- torch's MultiheadAttention beneath an adapter ----------------------------------------------------------


def attentions(model: nn.Module) -> dict[str, Any]:
    """The adapted layers around torch's MultiheadAttention, by name."""
    return {name: layer for name, layer in adapted_layers(model).items() if _is_attention(layer)}


def _is_attention(layer: Any) -> bool:
    # not a wrapper around one of its parameters alone
    return isinstance(base_of(layer)[0], nn.MultiheadAttention) and not hasattr(layer, "parameter_name")


def _projections(layer: Any) -> tuple[nn.Module, Any, nn.Module]:
    """The attention, the adapter around its output projection, and that projection."""
    attention: Any = base_of(layer)[0]
    return attention, attention.out_proj, base_of(attention.out_proj)[0]


def _effective_weights(
    layer: Any, adapters: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the layer computes with, as its own forward pass makes it: both projections, the output's bias."""
    attention, around, output = _projections(layer)
    held = dict(attention._parameters), dict(output._parameters)
    bias: Any = output.bias
    try:
        if bias is not None:  # to which the layer adds where it lies
            output._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
        with torch.no_grad():
            layer.merge(adapter_names=adapters)
        inward, outward = attention.in_proj_weight, output.weight
        own: Any = output.bias
        added = None if own is None else own.detach()
        return inward.detach(), outward.detach(), added  # type: ignore[operator]
    finally:
        for module, parameters in zip((attention, output), held, strict=True):
            for key in parameters:
                vars(module).pop(key, None)
            module._parameters.clear()
            module._parameters.update(parameters)
        layer.merged_adapters.clear()
        around.merged_adapters.clear()


@contextlib.contextmanager
def _merged_attention(layer: Any) -> Iterator[None]:
    attention, around, output = _projections(layer)
    adapters = working_adapters(layer)
    values = _effective_weights(layer, adapters)
    originals = dict(attention._parameters), dict(output._parameters)
    biased = "bias" in replaced_keys(around)
    try:
        names = [(attention, "in_proj_weight"), (output, "weight"), (output, "bias")]
        for (module, key), value in zip(names, values, strict=True):
            if value is not None and (key != "bias" or biased):
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
        layer.merged_adapters[:] = around.merged_adapters[:] = adapters
        yield
    finally:
        for module, parameters in zip((attention, output), originals, strict=True):
            module._parameters.clear()
            module._parameters.update(parameters)
        layer.merged_adapters.clear()
        around.merged_adapters.clear()


def adds_twice(layer: Any) -> bool:
    """Whether an adapted attention adds the adapter of its output projection twice, as peft 0.21 does.

    Its gradients count it once, so that they are not those of what it computes. Asked of the layer with
    factors of ones in the place of its own.
    """
    _, around, output = _projections(layer)
    adapters = working_adapters(layer)[:1]
    if not adapters:
        return False
    factors = [getattr(around, name)[adapters[0]] for name in ("lora_A", "lora_B")]
    held = [factor._parameters["weight"] for factor in factors]
    try:
        for factor, own in zip(factors, held, strict=True):
            factor._parameters["weight"] = nn.Parameter(torch.ones_like(own), requires_grad=False)
        with torch.no_grad():
            change = around.get_delta_weight(adapters[0]).double()
            frozen = output.get_parameter("weight").double()
            added = _effective_weights(layer, adapters)[1].double() - frozen
        return bool((added - change).norm() > 0.5 * change.norm())
    finally:
        for factor, own in zip(factors, held, strict=True):
            factor._parameters["weight"] = own


@contextlib.contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Inside, adapted attentions keep their frozen parameters, and no adapter is passed over.

    peft's layer adds its adapter to the weights before each call and subtracts it after, which rounds, and
    makes new parameters at each walk through the modules: inside, the first ones stay. What adapts a single
    parameter changes the order of its module's with the first call: inside it is that of their names. torch's
    fast path of inference reads weights beneath adapters, as if there were none: inside it is off.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for layer in adapted_layers(model).values():
            if _is_attention(layer):
                stack.enter_context(_steady(layer))
            elif hasattr(layer, "parameter_name"):
                stack.enter_context(_in_order(layer))
        yield


@contextlib.contextmanager
def _in_order(layer: Any) -> Iterator[None]:
    parameters = base_of(layer)[0]._parameters
    order = list(parameters)

    def arrange(wanted: list[str]) -> None:
        held = dict(parameters)  # without those that another wrapper has taken out for its call
        parameters.clear()
        parameters.update({key: held.pop(key) for key in wanted if key in held})
        parameters.update(held)

    arrange(sorted(order))
    handle = layer.register_forward_hook(lambda *_: arrange(sorted(order)), always_call=True)
    try:
        yield
    finally:
        handle.remove()
        arrange(order)


@contextlib.contextmanager
def _steady(layer: Any) -> Iterator[None]:
    if "_restore_weights" in vars(layer):  # steady already
        yield
        return
    attention, around, output = _projections(layer)
    held = [(module, dict(module._parameters)) for module in (attention, output)]
    bias = None if output.bias is None else output.bias.detach().clone()  # type: ignore[operator]

    def put_back(*_: Any) -> None:
        if layer.merged:  # in a merged space, whose parameters nobody replaces
            return
        for module, parameters in held:
            for key, parameter in parameters.items():
                vars(module).pop(key, None)
                module._parameters[key] = parameter
        if any(getattr(around, "lora_bias", {}).values()):  # added to where it lies
            output.bias.data.copy_(bias)  # type: ignore[operator]

    layer._restore_weights = lambda: None
    handle = layer.register_forward_hook(put_back, always_call=True)
    try:
        yield
    finally:
        handle.remove()
        put_back()
        del layer._restore_weights
