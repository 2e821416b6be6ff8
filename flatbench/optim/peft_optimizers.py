"""The optimizers that peft ships for LoRA, behind the same interface as the methods."""

from __future__ import annotations

from typing import Annotated, Any

import peft.optimizers
import torch
from pydantic import Field
from torch import nn

from flatbench.errors import InputError
from flatbench.models.factors import lora_factors
from flatbench.optim.base import WrappedOptimizer
from flatbench.optim.joined import Joined


class LoRAPlus(WrappedOptimizer):
    """LoRA+: the base optimizer with a larger learning rate for B than for A (arXiv 2402.12354).

    The parameter groups are those of ``peft.optimizers.create_loraplus_optimizer``: A and everything else
    that is a matrix, embeddings' adapters, B, and vectors. They replace the base optimizer's.

    Args:
        base_optimizer: makes the update; its learning rate is A's, its weight decay that of matrices.
        model: a model with LoRA layers that train.
        lr_ratio: learning rate of B over that of A.
        embedding_lr_ratio: learning rate of embeddings' adapters over that of A.

    Raises:
        InputError: the model has no LoRA layer that trains, or the optimizer holds other parameters than
            those of the model that train.
        ValueError: a ratio is not positive.
    """

    needs_adapter = True

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        lr_ratio: Annotated[float, Field(gt=0)] = 16.0,
        embedding_lr_ratio: Annotated[float, Field(gt=0)] = 1.0,
    ) -> None:
        for name, value in (("lr_ratio", lr_ratio), ("embedding_lr_ratio", embedding_lr_ratio)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, found {value}")
        if isinstance(base_optimizer, Joined):
            parts = " and ".join(type(part).__name__ for part in base_optimizer.parts)
            raise InputError(
                f"lora_plus makes parameter groups of its own, and those of {parts} are divided between "
                "them; choose one base optimizer for all"
            )
        if not lora_factors(model):
            raise InputError("lora_plus sets LoRA's learning rates, and no LoRA layer of the model trains")
        _check_same_parameters("lora_plus", base_optimizer, model)
        old = base_optimizer.param_groups
        lr = old[0]["lr"]
        plus: Any = peft.optimizers.create_loraplus_optimizer(
            model,
            torch.optim.SGD,  # only its groups are used
            lr=lr,
            loraplus_lr_ratio=lr_ratio,
            loraplus_weight_decay=max(group.get("weight_decay", 0.0) for group in old),
            loraplus_lr_embedding=lr * embedding_lr_ratio,
        )
        wanted = [group for group in plus.param_groups if group["params"]]
        defaults = {key: value for key, value in old[0].items() if key not in ("params", "initial_lr")}
        base_optimizer.param_groups[:] = [
            {**defaults, **{key: group[key] for key in ("params", "lr", "weight_decay")}} for group in wanted
        ]
        super().__init__(base_optimizer, model)


class LoRAFA(WrappedOptimizer):
    """LoRA-FA: A stays as it is, and B's gradient is that of the full weight's best approximation.

    ``peft.optimizers.create_lorafa_optimizer`` makes the update (arXiv 2308.03303): AdamW on
    ``(1/s²)·g_B·(A·Aᵀ)⁻¹``. The given base optimizer lends learning rate, weight decay, betas, eps and its
    hooks; it makes no update itself.

    Args:
        base_optimizer: Adam or AdamW over the model's trainable parameters.
        model: a model with LoRA layers that train.

    Raises:
        InputError: the model has no LoRA layer that trains, or one that peft's optimizer cannot treat.
    """

    needs_adapter = True

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if not isinstance(base_optimizer, torch.optim.Adam):
            raise InputError(
                f"lora_fa is an Adam itself and cannot use {type(base_optimizer).__name__}; choose adamw"
            )
        factors = lora_factors(model)
        if not factors:
            raise InputError("lora_fa trains LoRA's B, and no LoRA layer of the model trains")
        for f in factors:
            dora = f.adapter in getattr(f.layer, "lora_magnitude_vector", {})
            if f.kind != "linear" or dora:
                what = "DoRA" if dora else f"an adapter of a {f.kind}"
                raise InputError(f"lora_fa: {f.name}: peft's LoRA-FA optimizer cannot treat {what}")
        names = [f.name for f in factors]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise InputError(
                f"lora_fa: {twice}: peft's LoRA-FA optimizer cannot treat two adapters of a module"
            )
        _check_same_parameters("lora_fa", base_optimizer, model)
        self._factors = factors
        #: the group's entries, while a step leaves some out
        self._whole: dict[str, list[Any]] = {}
        super().__init__(_lorafa(base_optimizer, model), model)

    def _before_update(self) -> None:
        """Leave out layers without a gradient, as torch's optimizers do: peft's expects one in every B."""
        idle = {id(p) for f in self._factors if f.B.grad is None for p in (f.A, f.B)}
        self._whole = {}
        if not idle:
            return
        group = self.base.param_groups[0]
        self._whole = {key: group[key] for key in ("params", "names", "scaling_factors")}
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in idle]
        for key, entries in self._whole.items():
            group[key] = [entries[i] for i in kept]

    def _after_update(self) -> None:
        self.base.param_groups[0].update(self._whole)

    def _forget_step(self) -> None:
        self._after_update()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that are no adapter's."""
        parameters = param_group["params"]
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        start = len(self.base.param_groups)
        super().add_param_group(
            {
                "names": [f"group{start}.{i}" for i in range(len(parameters))],
                "scaling_factors": [None] * len(parameters),
                **param_group,
                "params": parameters,
            }
        )


def _lorafa(base: torch.optim.Adam, model: nn.Module) -> torch.optim.Optimizer:
    """peft's optimizer with the base's options and hooks, over what trains and the A beside it."""
    old = base.param_groups[0]
    adapters: Any = model.peft_config
    config = next(iter(adapters.values()))
    made: torch.optim.Optimizer = peft.optimizers.create_lorafa_optimizer(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lr=old["lr"],
        weight_decay=max(group["weight_decay"] for group in base.param_groups),
    )
    (group,) = made.param_groups
    entries = zip(group["params"], group["names"], group["scaling_factors"], strict=True)
    # peft lists the frozen model too, which a state of the optimizer would count through for nothing
    kept = [(p, n, s) for p, n, s in entries if p.requires_grad or ".lora_A." in n]
    group["params"], group["names"], group["scaling_factors"] = (
        list(column) for column in zip(*kept, strict=True)
    )
    group["betas"], group["eps"] = old["betas"], old["eps"]
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(made, hooks, getattr(base, hooks))
    return made


def _check_same_parameters(method: str, base: torch.optim.Optimizer, model: nn.Module) -> None:
    held = {id(p) for group in base.param_groups for p in group["params"]}
    if held != {id(p) for p in model.parameters() if p.requires_grad}:
        raise InputError(
            f"{method} makes parameter groups of its own: give the base optimizer exactly the parameters of "
            "the model that train"
        )
