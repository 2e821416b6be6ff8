"""The parameters over which curvature is taken: of an adapter, of the merged weights, or of everything.

A parameter counts once, whatever the number of layers that use it and of names that it has. Layers that share
a weight and have adapters of their own share it no longer once these are merged: see
`flatbench.curvature.operators.adapters.merged`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.adapters import (
    FACTORS,
    adapted_layers,
    adds_twice,
    attentions,
    base_of,
    check_mergeable,
    is_adapted,
    layers_in_use,
    merged,
    replaced_keys,
    weight_key,
)
from flatbench.errors import InputError, NotApplicableError

#: ``adapter``: LoRA's A and B. ``merged``: the full weights ``W0 + s·B·A`` of the adapted layers, the same
#: weights for a fully fine-tuned model. ``all``: every weight of the merged model.
NamedSpace = Literal["adapter", "merged", "all"]
#: a space by its name; a function chooses among the weights of ``all`` by theirs; a mapping is taken as it is
Space = NamedSpace | Callable[[str], bool] | Mapping[str, nn.Parameter]

_WRAPPER_NAMES = re.compile(
    r"\.base_layer(?=\.|$)|\.modules_to_save\.[^.]+|\.original_module(?=\.|$)|(?:(?<=\.)|^)_orig_mod\."
)
_PREFIX = "base_model.model."


def plain_name(name: str) -> str:
    """The name of a parameter or a module in the model without its adapter."""
    return _WRAPPER_NAMES.sub("", name).removeprefix(_PREFIX)


@contextlib.contextmanager
def spanned(
    model: nn.Module, space: Space, only: Callable[[str], bool] | None = None
) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of a space by name; inside, only they require gradients.

    For a model with an adapter and any space but ``adapter``, the adapted layers hold their merged weights
    inside, one copy beside the frozen ones; afterwards the frozen weights are back, bit for bit. Names are
    those of the model without its adapter, except in ``adapter``. Of the space's parameters, ``only`` chooses
    by name. Parameters that are one memory (weights tied by their data) are one parameter inside.

    `flatbench.curvature.operators.entrance.entered` is the way in that checks the model's function.

    Raises:
        InputError: the space is unknown, or holds no parameter, or one that has no gradient.
        NotApplicableError: an adapter cannot be merged, or parameters overlap in memory.
        FlatbenchError: a merged weight is not finite.
    """
    with merged(model) if _is_of_merged_model(space) else contextlib.nullcontext():
        parameters = parameters_of(model, space, only)
        with _tie(model, parameters):
            wanted = {id(parameter) for parameter in parameters.values()}
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in wanted)
            yield parameters


def parameters_of(
    model: nn.Module, space: Space, only: Callable[[str], bool] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that `spanned` gives, by the same names, without any change to the model.

    Where an adapter is yet to be merged, its frozen weight stands for the sum, which has its shape.
    """
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


def adapted_weights(model: nn.Module) -> dict[str, list[str]]:
    """The weights of ``merged`` by their names in ``all``, module by module, by the modules' plain names.

    A module that stands in several places (its adapter with it) is named by the first.

    Raises NotApplicableError for an adapter that cannot be merged.
    """
    places = slots(model)
    canonical: dict[Hashable, str] = {}
    for slot in places:
        canonical.setdefault(slot.identity, slot.name)
    found: dict[str, list[str]] = {}
    for layer_name, layer in layers_in_use(model).items():
        check_mergeable(plain_name(layer_name), layer)
        own = (id(base_of(layer)[0]), weight_key(layer))
        names = [canonical[s.identity] for s in places if s.adapted and (id(s.module), s.key) == own]
        found.setdefault(plain_name(layer_name), []).extend(names)
    return found


def weight_names(model: nn.Module, module: str) -> list[str]:
    """The names in ``all`` of a module's own weights, as an adapter on it would choose them; none is none.

    Weights that the module shares with another are named as they are in the space.
    """
    canonical: dict[Hashable, str] = {}
    found = []
    for slot in slots(model):
        name = canonical.setdefault(slot.identity, slot.name)
        own = slot.name in (f"{module}.weight", f"{module}.in_proj_weight")
        if own or (slot.name == f"{module}.out_proj.weight" and _is_attention(model, module)):
            found.append(name)
    return found


def _is_attention(model: nn.Module, name: str) -> bool:
    modules = model.named_modules(remove_duplicate=False)
    return any(plain_name(own) == name and isinstance(m, nn.MultiheadAttention) for own, m in modules)


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
    for name, layer in attentions(model).items():
        if adds_twice(layer):
            raise NotApplicableError(
                f"{name}: this version of peft adds the adapter of a MultiheadAttention's output twice and "
                "its gradient once, so that gradients in A and B are not the loss's; measure in the space "
                "'merged'"
            )
    wanted: set[int] = set()
    for layer in adapted_layers(model).values():
        for adapter in getattr(layer, "active_adapters", ()):
            for container in (getattr(layer, name, {}) for name in FACTORS):
                if adapter in container:
                    held = container[adapter]
                    wanted |= {id(held)} if isinstance(held, Tensor) else {id(p) for p in held.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


# -- the places of a model's parameters -------------------------------------------------------------------


class Slot(NamedTuple):
    """A place of a parameter: the module that holds it and its key there."""

    name: str  #: without the adapter's wrappers
    module: nn.Module
    key: str
    parameter: nn.Parameter
    adapted: bool  #: whether the module is one beneath an adapter
    identity: Hashable  #: equal for places of one and the same parameter of the merged model


def slots(model: nn.Module) -> list[Slot]:
    """Every place of the merged model's parameters: not the adapter's own, nor those of replaced modules."""
    hidden: tuple[str, ...] = ()
    layers: dict[int, list[Any]] = {}
    inner: set[str] = set()  # names of modules beneath adapters
    replaced: set[tuple[int, str]] = set()
    found = []
    for name, each in model.named_modules(remove_duplicate=False):
        if hidden and f"{name}.".startswith(hidden):
            continue
        module: Any = each
        dot = f"{name}." if name else ""
        if is_adapted(module):
            hidden += tuple(f"{dot}{child}." for child in module._modules if child != "base_layer")
            base = base_of(module)[0]
            layers.setdefault(id(base), []).append(module)
            inner.add(f"{dot}base_layer")
            replaced |= {(id(base), key) for key in replaced_keys(module)}
        elif name in inner and hasattr(module, "base_layer"):
            inner.add(f"{dot}base_layer")
        elif hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
            hidden += _unreached_parts(module, dot)
        held = module._parameters
        # the order beneath a wrapper of one parameter depends on whether the model was called
        alone = any(hasattr(layer, "parameter_name") for layer in layers.get(id(module), ()))
        for key, parameter in ((key, held[key]) for key in (sorted(held) if alone else held)):
            if parameter is None:
                continue
            adapted = name in inner
            apart = adapted and (id(module), key) in replaced
            identity: Hashable = ("merged", id(module), key) if apart else memory_of(parameter)
            found.append(Slot(plain_name(f"{dot}{key}"), module, key, parameter, adapted, identity))
    return found


def _unreached_parts(wrapper: Any, dot: str) -> tuple[str, ...]:
    """The parts of peft's ``modules_to_save`` wrapper that a call does not reach."""
    active = getattr(wrapper, "active_adapters", None) or [wrapper.active_adapter]
    saved = [name for name in active if name in wrapper.modules_to_save]
    if getattr(wrapper, "disable_adapters", False) or not saved:
        return (f"{dot}modules_to_save.",)
    others = [name for name in wrapper.modules_to_save if name not in saved]
    return (f"{dot}original_module.", *(f"{dot}modules_to_save.{name}." for name in others))


def memory_of(parameter: Tensor) -> Hashable:
    """Equal for parameters that are the same numbers: themselves, or their memory and its layout."""
    if parameter.numel() == 0 or parameter.device.type == "meta" or type(parameter) is not nn.Parameter:
        return id(parameter)
    where = (parameter.device, parameter.data_ptr())
    return (*where, parameter.dtype, parameter.shape, parameter.stride())


def _merged_parameters(model: nn.Module, space: Any) -> dict[str, nn.Parameter]:
    layers = layers_in_use(model)
    for name, layer in layers.items():
        check_mergeable(plain_name(name), layer)
    places = slots(model)
    weights = {(id(base_of(x)[0]), weight_key(x)) for x in layers.values()}
    of_adapted = {s.identity for s in places if s.adapted and (id(s.module), s.key) in weights}
    found: dict[str, nn.Parameter] = {}
    seen: set[Hashable] = set()
    for slot in places:
        wanted = (
            space == "all"
            or (space == "merged" and slot.identity in of_adapted)
            or (callable(space) and space(slot.name))
        )
        if wanted and slot.identity not in seen:
            seen.add(slot.identity)
            found[slot.name] = slot.parameter
    return found


# -- parameters that share their memory -------------------------------------------------------------------


@contextlib.contextmanager
def _tie(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, each of the parameters stands wherever its numbers are used.

    Two parameters over one memory (``head.weight.data = embedding.weight.data``) move together, and a
    gradient of one alone would be half of the truth.

    Raises NotApplicableError where a parameter overlaps with another tensor of the model in some other way.
    """
    own = {memory_of(parameter): parameter for parameter in parameters.values()}
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is None:
                    continue
                mine = own.get(memory_of(parameter), parameter)
                if mine is not parameter:
                    taken.append((module, key, parameter))
        for module, key, _ in taken:
            module._parameters[key] = own[memory_of(module._parameters[key])]  # type: ignore[arg-type]
        _check_overlaps(model, parameters)
        yield
    finally:
        for module, key, parameter in taken:
            module._parameters[key] = parameter


def _check_overlaps(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    moving = {id(p): name for name, p in parameters.items()}
    by_storage: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = {}
    others = [*model.named_parameters(), *model.named_buffers()]
    listed = [*parameters.items(), *((name, t) for name, t in others if id(t) not in moving)]
    for name, tensor in listed:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if plain and tensor.numel() and tensor.device.type != "meta":
            storage = tensor.untyped_storage().data_ptr()
            by_storage.setdefault((tensor.device, storage), []).append((name, tensor))
    for shared in by_storage.values():
        if len(shared) > 1:
            _check_apart(shared, set(moving))


def _check_apart(shared: list[tuple[str, Tensor]], moving: set[int]) -> None:
    """Raise NotApplicableError if a moving tensor has an element in common with another of its storage."""
    ordered = sorted(shared, key=lambda each: _extent(each[1]))
    for i, (name, tensor) in enumerate(ordered):
        for other, beside in ordered[i + 1 :]:
            if _extent(beside)[0] >= _extent(tensor)[1]:
                break
            if (id(tensor) in moving or id(beside) in moving) and _overlap(tensor, beside):
                raise NotApplicableError(
                    f"{name} and {other} lie in the same memory (tied adapters, or views of one tensor), so "
                    "that a step in one is a step in the other; measure tied adapters in the space 'merged', "
                    "and make of other parameters one, or two"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    first, second = _extent(one), _extent(other)
    start, end = min(first[0], second[0]), max(first[1], second[1])
    if first[1] <= second[0] or second[1] <= first[0]:
        return False
    if one.dtype != other.dtype:
        return True
    size = one.element_size()
    marks = torch.zeros((end - start) // size, dtype=torch.bool)
    marks.as_strided(one.shape, one.stride(), (first[0] - start) // size).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), (second[0] - start) // size).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes between a tensor's first and behind its last element, from the beginning of its storage."""
    size, start = tensor.element_size(), int(tensor.storage_offset())
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + last + 1) * size
