"""Models whose weights accelerate keeps on a disk, or in another memory, until a layer is called.

accelerate's hooks bring a layer's weights before its forward pass and take them away after it, so that no
backward pass finds them. Inside of `within_reach` the hooks rest, and a weight is read by every operation
that uses it instead, backward passes of any order included: memory holds one weight at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from flatbench.curvature.operators import memory
from flatbench.curvature.operators.fingerprint import checksum
from flatbench.curvature.operators.spaces import plain_name
from flatbench.curvature.operators.widened import Offloaded
from flatbench.errors import InputError, NotApplicableError, shown


@dataclass(frozen=True)
class _Place:
    """Where a module holds a weight that is away.

    Attributes:
        held: the module's parameters or buffers, by key.
        read: gives the weight; None where nobody is known who could.
        device: where it is computed with.
    """

    held: dict[str, Any]
    key: str
    name: str
    read: Callable[[], Tensor] | None
    device: torch.device


def device_of(model: nn.Module, parameter: Tensor) -> torch.device:
    """Where a parameter is computed with: where it is, or where accelerate brings it."""
    if parameter.device.type != "meta":
        return parameter.device
    found = [p.device for p in _places(model) if p.held[p.key] is parameter and p.read is not None]
    return found[0] if found else parameter.device


def refuse_lost(model: nn.Module) -> None:
    """Raise NotApplicableError for weights that are away and that no hook of accelerate's brings back.

    Likewise for those that are computed with on several devices.
    """
    _check(_places(model))


@contextlib.contextmanager
def put_away_again(model: nn.Module) -> Iterator[None]:
    """Afterwards, weights that were away are: accelerate leaves those of a layer whose forward pass fails."""
    before = [(place, place.held[place.key]) for place in _places(model)]
    try:
        yield
    finally:
        for place, weight in before:
            if place.held[place.key].device.type != "meta":
                place.held[place.key] = weight


@contextlib.contextmanager
def within_reach(
    model: nn.Module,
    moving: Iterable[nn.Parameter] = (),
    *,
    chosen: Iterable[nn.Parameter] = (),
) -> Iterator[None]:
    """Inside, weights that accelerate has put away are read as they are used, and its hooks rest.

    Args:
        moving: parameters that will be moved, or merged with their adapters: they are brought into memory
            whole, as buffers are.
        chosen: those of them that are a space of weights, of which equal constants may be ties as well.

    Raises InputError for what has to be in memory whole and does not fit there, or cannot be read, and what
    `refuse_lost` raises.
    """
    places = _places(model)
    if not places:
        yield
        return
    _check(places)
    whole = {id(parameter) for parameter in moving}
    _check_room([p for p in places if id(p.held[p.key]) in whole])
    _refuse_lost_ties(model, places, whole, {id(parameter) for parameter in chosen})
    made: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            _unhook(module, stack)
        for place in places:
            before, read = place.held[place.key], place.read
            assert read is not None
            if id(before) not in made:
                brought: Tensor
                if not isinstance(before, nn.Parameter):
                    brought = read().to(place.device)
                elif id(before) in whole:
                    data = read().to(place.device, copy=True)
                    brought = nn.Parameter(data, requires_grad=before.requires_grad)
                else:
                    held = Offloaded(
                        _checking_reader(read, before, place.name), before.detach(), place.device
                    )
                    brought = nn.Parameter(held, requires_grad=False)
                made[id(before)] = brought
            stack.callback(place.held.__setitem__, place.key, before)
            place.held[place.key] = made[id(before)]
        yield


def _checking_reader(read: Callable[[], Tensor], like: Tensor, name: str) -> Callable[[], Tensor]:
    """``read``, which refuses what has another shape or type than the model says."""

    def checked() -> Tensor:
        found = read()
        if found.shape != like.shape or found.dtype != like.dtype:
            raise InputError(
                f"{name} was put away as {tuple(found.shape)}, {found.dtype}; the model has "
                f"{tuple(like.shape)}, {like.dtype}: offload the model again"
            )
        return found

    return checked


def _check(places: list[_Place]) -> None:
    lost = [place.name for place in places if place.read is None]
    if lost:
        raise NotApplicableError(
            f"{len(lost)} weights are not in memory ({lost[0]} is on the device 'meta'), and no hook of "
            "accelerate's brings them: load the model with its weights"
        )
    devices = sorted({str(place.device) for place in places})
    if len(devices) > 1:
        raise NotApplicableError(
            f"weights that are offloaded are computed with on several devices ({', '.join(devices)}): give "
            "the model a device_map with one"
        )


def _check_room(places: list[_Place]) -> None:
    """Raise InputError where the weights of a space do not fit into memory."""
    weights = {id(p.held[p.key]): p.held[p.key] for p in places}.values()
    size = sum(weight.numel() * max(weight.element_size(), 4) for weight in weights)
    if size and size > memory.available(places[0].device):
        raise InputError(
            f"the space moves {len(weights)} weights that are offloaded, {memory.readable(size)} in float32, "
            f"and {memory.readable(memory.available(places[0].device))} of memory are free: choose a smaller "
            "space (adapter, or `only`)"
        )


def _refuse_lost_ties(model: nn.Module, places: list[_Place], moving: set[int], chosen: set[int]) -> None:
    """Raise NotApplicableError where a weight that moves was one with another, as far as its numbers tell.

    What a model has tied (an embedding and its head) accelerate keeps as two, and a step in one would not be
    a step in the other.
    """
    away = {id(p.held[p.key]): p for p in places}
    alike: dict[Hashable, dict[int, str]] = {}
    for name, parameter in model.named_parameters():
        shape = tuple(sorted(parameter.shape))  # one may be the other's transpose
        alike.setdefault((shape, parameter.dtype), {})[id(parameter)] = plain_name(name)
    by_id = {id(parameter): parameter for parameter in model.parameters()}
    for names in alike.values():
        if len(names) < 2 or not names.keys() & moving or not names.keys() & away.keys():
            continue
        seen: dict[Hashable, int] = {}
        for own, name in names.items():
            place = away.get(own)
            tensor = by_id[own].detach() if place is None or place.read is None else place.read()
            constant = tensor.numel() < 2 or bool((tensor == tensor.flatten()[0]).all())
            if constant and not names.keys() & chosen:
                continue  # factors begin as zeros
            turned = tensor.mT.contiguous() if tensor.ndim > 1 else tensor
            other = seen.get((turned.shape, int(checksum(turned))), own)
            other = seen.setdefault((tensor.shape, int(checksum(tensor))), other)
            if other != own and {own, other} & moving and {own, other} & away.keys():
                elsewhere = "measure in the space 'adapter', choose other weights with `only`, or "
                raise NotApplicableError(
                    f"{names[other]} and {name} hold the same numbers, and accelerate keeps what a model has "
                    f"tied as two weights, of which each would move alone: {elsewhere if chosen else ''}load "
                    "the model into memory"
                )


# -- accelerate's hooks --------------------------------------------------------------------------------------


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module that bring weights."""
    hook = getattr(module, "_hf_hook", None)
    found = [] if hook is None else [hook, *getattr(hook, "hooks", ())]
    return [each for each in found if getattr(each, "offload", False)]


def _unhook(module: Any, stack: contextlib.ExitStack) -> None:
    """Take a module's forward pass of before its hook, until the stack is left."""
    before = vars(module).get("_old_forward")
    if before is None or not _hooks(module):
        return
    hooked = vars(module).get("forward")
    if hooked is None:  # a compiled module's class holds it
        raise NotApplicableError(f"the hook of a {type(module).__name__} cannot be taken off")
    stack.callback(setattr, module, "forward", hooked)
    module.forward = before


def _places(model: nn.Module) -> list[_Place]:
    """Where weights are away, each slot once."""
    readers: dict[tuple[int, str], tuple[Callable[[], Tensor], torch.device]] = {}
    for module in model.modules():
        for hook in _hooks(module):
            device = torch.device("cpu" if hook.execution_device is None else hook.execution_device)
            for path, owner in module.named_modules() if hook.place_submodules else [("", module)]:
                for key in (*owner._parameters, *owner._buffers):
                    name = f"{path}.{key}".lstrip(".")
                    readers[id(owner), key] = (_reader(hook.weights_map, name), device)
    found = []
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None and tensor.device.type == "meta":
                    read, device = readers.get((id(module), key), (None, tensor.device))
                    name = plain_name(f"{prefix}.{key}".lstrip("."))
                    found.append(_Place(held, key, name, read, device))
    return found


def _reader(weights: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    """Read a weight. Raises InputError inside where it is no longer there."""

    def read() -> Tensor:
        try:
            return weights[name].detach()
        except (KeyError, OSError, ValueError, SafetensorError) as error:
            raise InputError(
                f"{name} cannot be read from where accelerate put it ({shown(str(error), 200)}): load the "
                "model again"
            ) from error

    return read
