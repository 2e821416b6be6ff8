"""The parameters over which curvature is taken: of an adapter, of the merged weights, or of everything.

A low-rank adapter is recognised by its shape, that of peft's layers: a module with ``base_layer``,
``lora_A``, ``lora_B`` and ``merge``. Nothing of peft is imported.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch import nn

from flatbench.errors import FlatbenchError, InputError

#: ``adapter``: LoRA's A and B. ``merged``: the full weights ``W0 + s·B·A`` of the adapted layers, the same
#: weights for a fully fine-tuned model. ``all``: every weight of the merged model.
NamedSpace = Literal["adapter", "merged", "all"]
#: a space by its name; a function chooses among the weights of ``all`` by theirs; a mapping is taken as it is
Space = NamedSpace | Callable[[str], bool] | Mapping[str, nn.Parameter]

_WRAPPER_NAMES = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+|(?:(?<=\.)|^)_orig_mod\.")
_PREFIX = "base_model.model."


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a low-rank adapter around another layer."""
    return all(hasattr(module, name) for name in ("base_layer", "lora_A", "lora_B", "merge"))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The low-rank adapted layers by name."""
    return {name: module for name, module in model.named_modules() if is_adapted(module)}


def plain_name(name: str) -> str:
    """A parameter's name in the model without its adapter."""
    return _WRAPPER_NAMES.sub("", name).removeprefix(_PREFIX)


@contextlib.contextmanager
def spanned(
    model: nn.Module, space: Space, only: Callable[[str], bool] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of a space by name; inside, only they require gradients.

    For a model with an adapter and any space but ``adapter``, the adapted layers hold their merged weights
    inside, one copy beside the frozen ones; afterwards the frozen weights are back, bit for bit. Names are
    those of the model without its adapter, except in ``adapter``. Of the space's parameters, ``only`` chooses
    by name.

    Raises:
        InputError: the space is unknown, or holds no parameter, or one that has no gradient.
        FlatbenchError: a merged weight is not finite.
    """
    parameters = parameters_of(model, space, only)
    with merged(model) if _is_of_merged_model(space) else contextlib.nullcontext():
        wanted = {id(parameter) for parameter in parameters.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        yield parameters


def parameters_of(
    model: nn.Module, space: Space, only: Callable[[str], bool] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that `spanned` gives, without any change to the model."""
    if isinstance(space, Mapping):
        parameters = dict(space)
    elif space == "adapter":
        parameters = _factors(model)
    elif _is_of_merged_model(space):
        parameters = _merged_parameters(model, space)
    else:
        raise InputError(f"space: '{space}' is none of adapter, merged, all")
    parameters = {name: p for name, p in parameters.items() if only is None or only(name)}
    _check(parameters, space)
    return parameters


def _is_of_merged_model(space: Space) -> bool:
    return space in ("merged", "all") or callable(space)


def _check(parameters: Mapping[str, nn.Parameter], space: Space) -> None:
    shown = space if isinstance(space, str) else "of the given names"
    if not sum(parameter.numel() for parameter in parameters.values()):
        raise InputError(f"the model has no parameter in the space {shown}")
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise InputError(f"{name} is quantized ({parameter.dtype}) and has no curvature in this space")


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    wanted: set[int] = set()
    for layer in adapted_layers(model).values():
        for adapter in getattr(layer, "active_adapters", ()):
            for name in ("lora_A", "lora_B"):
                if adapter in getattr(layer, name):
                    wanted |= {id(p) for p in getattr(layer, name)[adapter].parameters()}
            for name in ("lora_embedding_A", "lora_embedding_B"):
                if adapter in getattr(layer, name, {}):
                    wanted.add(id(getattr(layer, name)[adapter]))
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def _merged_parameters(model: nn.Module, space: Any) -> dict[str, nn.Parameter]:
    layers = adapted_layers(model)
    hidden: set[int] = set()  # what is no weight of the merged model: the adapter's own, and replaced modules
    for each in model.modules():
        module: Any = each
        if is_adapted(module):
            kept = {id(p) for p in module.base_layer.parameters()}
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            active = getattr(module, "active_adapters", None) or [module.active_adapter]
            saved = [module.modules_to_save[name] for name in active if name in module.modules_to_save]
            kept = {id(p) for replaced in saved for p in replaced.parameters()}
        else:
            continue
        hidden |= {id(p) for p in module.parameters()} - kept
    weights = {id(layer.base_layer.weight) for layer in layers.values()}
    found = {}
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        if id(parameter) in hidden:
            continue
        if (
            space == "all"
            or (space == "merged" and id(parameter) in weights)
            or (callable(space) and space(plain))
        ):
            found[plain] = parameter
    return found


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, every adapted layer computes with ``W0 + s·B·A`` as one weight, its adapter folded in.

    The frozen weight is kept beside and put back, not recovered by subtraction. Layers that are merged
    already stay so.

    Raises FlatbenchError if a merged weight is not finite.
    """
    taken: list[tuple[Any, dict[str, Any], list[str], dict[str, Any]]] = []
    try:
        for name, layer in adapted_layers(model).items():
            if layer.merged:
                continue
            own = {key: p.data for key, p in layer.base_layer.named_parameters(recurse=False)}
            taken.append((layer, own, list(layer.merged_adapters), dict(getattr(layer, "_caches", {}))))
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # peft's words for weights that are not finite
                raise FlatbenchError(f"{name}: the adapter cannot be merged: {error}") from error
        yield
    finally:
        for layer, own, adapters, caches in taken:
            for key, data in own.items():
                layer.base_layer.get_parameter(key).data = data
            layer.merged_adapters[:] = adapters
            if hasattr(layer, "_caches"):
                layer._caches.clear()
                layer._caches.update(caches)
