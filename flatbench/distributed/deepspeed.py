"""A model in shards by stage 3 of DeepSpeed's ZeRO, as a configuration of accelerate asks."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from flatbench.config.accelerate import DeepSpeedOptions
from flatbench.distributed.shard import Shard


def divide(
    model: nn.Module, options: DeepSpeedOptions, whole: set[nn.Parameter], device: torch.device
) -> Any:
    """Divide a model's parameters among the processes of the group, in place.

    DeepSpeed gathers a layer's weights when it is their turn, and makes no steps here. What is in ``whole``
    stays whole in every process. Of all other parameters that train, averaged gradients go to each process's
    `part` as soon as they are there.

    Returns:
        DeepSpeed's engine, without which nothing is gathered: to be kept as long as the model.
    """
    deepspeed = _deepspeed(device)
    # small weights are divided too: of one that stayed, not the part that is moved would be used
    divided: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if options.offload_param_device == "cpu":
        divided["offload_param"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": divided}
    numbers: list[Any] = [p for p in model.parameters() if p.ndim == 0]
    for number in numbers:  # it broadcasts vectors and matrices only
        number.data = number.data.reshape(1)
    # one parameter after the other, so that no device ever holds the whole model
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    for number in numbers:
        number.ds_shape = torch.Size(())
    engine, *_ = deepspeed.initialize(model=model, config=config, dist_init_required=False)
    parameter: Any
    for parameter in model.parameters():
        if parameter in whole:
            parameter.all_gather()
            # DeepSpeed leaves alone what it does not count as a layer's own
            parameter.ds_persist = parameter.is_external_param = True
        elif parameter.requires_grad:
            parameter.flatbench_part = _part(parameter)
            parameter.register_post_accumulate_grad_hook(_divide_gradient)
    return engine


def _deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it found nothing better
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        # it would compile an exchange through shared memory first, which is not for training
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def is_divided(parameter: Any) -> bool:
    """Whether DeepSpeed keeps a parameter in parts."""
    return hasattr(parameter, "ds_tensor") and not parameter.ds_persist


def own(parameter: Any) -> Tensor:
    """This process's part of a parameter's entries, in their order: a vector that shares their memory."""
    # all parts have one length, of which the last ones may be padding
    found: Tensor = parameter.ds_tensor.data[: max(parameter.ds_numel - _start(parameter), 0)]
    return found


def _start(parameter: Any) -> int:
    """Where this process's part begins among all entries."""
    return int(parameter.ds_tensor.numel()) * torch.distributed.get_rank()


def part(parameter: Any) -> Shard:
    """This process's part of a parameter that trains."""
    found: Shard = parameter.flatbench_part
    return found


def _part(parameter: Any) -> Shard:
    entries = own(parameter)
    # weight decay and ASAM's scales tell matrices from vectors
    return Shard(entries.unsqueeze(1) if len(parameter.ds_shape) > 1 else entries)


@torch.no_grad()
def _divide_gradient(parameter: Any) -> None:
    size = parameter.ds_tensor.numel()
    processes = torch.distributed.get_world_size()
    padded = parameter.grad.new_zeros(size * processes)
    padded[: parameter.ds_numel] = parameter.grad.flatten()
    parameter.grad = None
    mine = padded.new_empty(size)
    torch.distributed.reduce_scatter_tensor(mine, padded)
    shard = part(parameter)
    gradient = mine[: shard.numel()].div_(processes).view_as(shard).to(shard.device)
    shard.grad = gradient if shard.grad is None else shard.grad + gradient


def whole(parameter: Any) -> Tensor:
    """The parameter, put together of all processes' parts; each has to ask for it then."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        found: Tensor = parameter.detach().clone()
    return found


@torch.no_grad()
def put(parameter: Any, value: Tensor) -> None:
    """Set this process's part of a parameter to that of a whole one."""
    entries, start = own(parameter), _start(parameter)
    entries.copy_(value.flatten()[start : start + entries.numel()])


def release(model: nn.Module) -> None:
    """Give up weights that are still gathered, so that the next pass gathers what the parts hold by then."""
    for parameter in model.parameters():
        if is_divided(parameter) and parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
            parameter.ds_active_sub_modules.clear()  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]
