"""A model in shards over the processes that train it, as a configuration of accelerate asks.

torch's FSDP divides it, or DeepSpeed; see `flatbench.distributed.deepspeed` for the latter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from flatbench.config.accelerate import AccelerateOptions, FSDPOptions
from flatbench.distributed import deepspeed
from flatbench.distributed.shard import Shard
from flatbench.errors import InputError


def shard(model: nn.Module, options: AccelerateOptions, device: torch.device, processes: int) -> Any:
    """Divide a model's parameters among the processes of the group, in place.

    Under an adapter what trains stays whole in every process, a few numbers beside the base model's, so that
    every method's mathematics is what it is in one process, and DistributedDataParallel averages gradients.
    Without one, all is divided, and so are the averaged gradients.

    Args:
        model: the same in each process, wherever it lies.
        device: where each process keeps its part.

    Returns:
        DeepSpeed's engine, to be kept as long as the model is trained; None if FSDP divides it.

    Raises:
        InputError: the model has no layers of the classes that the options name, or cannot be divided.
    """
    adapted = isinstance(model, peft.PeftModel)
    # the model that is called in the end, for generation too; its wrappers have no parameters of their own
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    whole = {p for p in model.parameters() if p.requires_grad} if adapted else set()
    engine = None
    if options.deepspeed_config is not None:
        engine = deepspeed.divide(inner, options.deepspeed_config, whole, device)
    elif options.fsdp_config is not None:
        _fully_shard(inner, options.fsdp_config, whole, device, processes)
    divided = [name for name, p in model.named_parameters() if is_divided(p)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, divided)
    return engine


def _fully_shard(
    inner: nn.Module, options: FSDPOptions, whole: set[nn.Parameter], device: torch.device, processes: int
) -> None:
    for name, parameter in inner.named_parameters():
        if parameter.ndim == 0:  # which torch's FSDP cannot divide
            if parameter.requires_grad and parameter not in whole:
                raise InputError(
                    f"train.accelerate.distributed_type: FSDP cannot divide the single number {name}, which "
                    "trains without an adapter; choose an adapter, or leave train.accelerate out"
                )
            whole.add(parameter)
    units = [*_units(inner, options, whole), inner]
    mesh = init_device_mesh(device.type, (processes,))
    for module in units:
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=options.fsdp_reshard_after_forward,
            ignored_params=whole,
        )
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def _units(inner: nn.Module, options: FSDPOptions, whole: set[nn.Parameter]) -> Iterator[nn.Module]:
    """Modules that are gathered as one, those inside others first."""
    wanted = _classes(inner, options)
    # DoRA reads the weight beneath its layer from outside of the module that owns it
    beneath = {
        id(m) for layer in inner.modules() if isinstance(layer, BaseTunerLayer) for m in _submodules(layer)
    }
    owners = Counter(id(p) for _, p in inner.named_parameters(remove_duplicate=False))
    for module in reversed(list(inner.modules())[1:]):
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or id(module) in beneath:
            continue  # of the first kind, a forward pass calls none
        if options.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP":
            chosen = type(module).__name__ in wanted
        else:
            size = sum(p.numel() for p in module.parameters() if p not in whole)
            large = size > options.fsdp_min_num_params
            chosen = large and options.fsdp_auto_wrap_policy == "SIZE_BASED_WRAP"
        own = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
        # a weight that others share is gathered with what holds them all
        if chosen and all(owners[key] == count for key, count in own.items()):
            yield module


def _submodules(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if m is not module)


def _classes(inner: nn.Module, options: FSDPOptions) -> set[str]:
    if options.fsdp_auto_wrap_policy != "TRANSFORMER_BASED_WRAP":
        return set()
    named = options.fsdp_transformer_layer_cls_to_wrap
    wanted = (
        {n.strip() for n in named.split(",")} if named else set(getattr(inner, "_no_split_modules", ()) or ())
    )
    there = {type(module).__name__ for module in inner.modules()}
    missing = sorted(wanted - there)
    if (named and missing) or not wanted & there:
        raise InputError(
            "train.accelerate.fsdp_config.fsdp_transformer_layer_cls_to_wrap: "
            + (f"the model has no {', '.join(missing)}" if missing else "the model names no layers itself")
            + f"; it has {', '.join(sorted(there))[:300]}; name a class among them, or choose another policy"
        )
    return wanted


def is_divided(tensor: Tensor) -> bool:
    """Whether a parameter is in parts."""
    return isinstance(tensor, DTensor) or deepspeed.is_divided(tensor)


def shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, of the whole one if it is divided."""
    found: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return found


def count(parameters: Iterable[Tensor]) -> int:
    """Numbers in parameters, of the whole ones if they are divided."""
    return sum(shape(parameter).numel() for parameter in parameters)


def own(tensor: Tensor) -> Tensor:
    """This process's part of a divided parameter, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else deepspeed.own(tensor)


def reshard(model: nn.Module) -> None:
    """Give up gathered weights, which a forward pass without a backward pass may have left.

    Then the next pass gathers what the shards hold by then.
    """
    deepspeed.release(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shards(parameters: Mapping[str, nn.Parameter]) -> dict[str, Shard]:
    """This process's parts of those parameters that are divided, sharing their memory."""
    found: dict[str, Shard] = {}
    for name, p in parameters.items():
        if isinstance(p, DTensor):
            found[name] = Shard(p.to_local().detach())
        elif deepspeed.is_divided(p):
            found[name] = deepspeed.part(p)
    return found


def take_gradients(parameters: Mapping[str, nn.Parameter], parts: Mapping[str, Shard]) -> None:
    """Move the gradients that a backward pass left in divided parameters to this process's parts."""
    for name, part in parts.items():
        if isinstance(parameters[name], DTensor):  # DeepSpeed's are there already
            gradient: Any = parameters[name].grad
            part.grad = None if gradient is None else gradient.to_local()
            parameters[name].grad = None


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together of all processes' parts if it is divided; each has to ask for it then."""
    if isinstance(tensor, DTensor):
        full: Tensor = tensor.full_tensor()
        return full.detach()
    return deepspeed.whole(tensor) if deepspeed.is_divided(tensor) else tensor.detach()


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Set a tensor, or this process's part of it, to a whole one."""
    if isinstance(tensor, DTensor):
        # each has the value, and nothing is sent
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.to_local().copy_(value.to_local())
    elif deepspeed.is_divided(tensor):
        deepspeed.put(tensor, value)
    else:
        tensor.copy_(value)
