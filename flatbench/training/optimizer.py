"""The optimizer that a study asks for, around its base optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flatbench import optim
from flatbench.config.sections import BaseOptimizerOptions, TrainOptions
from flatbench.distributed.shard import Shard
from flatbench.models import factors
from flatbench.optim import bases, joined
from flatbench.optim.base.buffers import Buffers
from flatbench.seeding import derive_seed


def build_optimizer(
    model: nn.Module,
    spec: Mapping[str, Any],
    train: TrainOptions,
    total_steps: int,
    seed: int = 0,
    shards: Sequence[Shard] = (),
    examples: int = 1,
) -> Any:
    """The optimizer that a resolved ``optimizer`` section describes, around its base optimizer.

    Weight decay acts on matrices only. Clipping is a hook of the base optimizer, so that in a method with
    two gradients it is the second one that is clipped. Where the section leaves ``total_steps``, ``seed`` or
    ``ess`` open, the method gets the run's: its number of steps, a stream of its seed, its training examples.

    Args:
        examples: how many it trains on.
        shards: this process's parts of the parameters, where the model is divided and they with it.
    """
    parameters: list[nn.Parameter] = list(shards or factors.trainable_parameters(model).values())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    base = _base_optimizer([g for g in groups if g["params"]], train.lr, spec["base"])
    limit = train.max_grad_norm
    if limit is not None:

        def clip(*_: Any) -> None:
            if not shards:
                torch.nn.utils.clip_grad_norm_(parameters, limit)
                return
            layout = Buffers(parameters)
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, layout.norm(layout.gradients()))

        base.register_step_pre_hook(clip)
    options = {key: value for key, value in spec.items() if key not in ("name", "base")}
    own = {"total_steps": total_steps, "seed": derive_seed(seed, "perturbation"), "ess": examples}
    options |= {key: value for key, value in own.items() if key in options and options[key] is None}
    return optim.REGISTRY.load(spec["name"])(base, model, **options)


def _base_optimizer(
    groups: list[dict[str, Any]], lr: float, spec: Mapping[str, Any]
) -> torch.optim.Optimizer:
    if spec.get("name") in bases.REGISTRY:
        return joined.build(groups, lr, spec["name"], {k: v for k, v in spec.items() if k != "name"})
    options = BaseOptimizerOptions.model_validate(spec)
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=options.momentum, nesterov=options.nesterov)
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=lr, betas=options.betas, eps=options.eps)
