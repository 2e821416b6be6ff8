"""Base optimizers by their names, and several of them as one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flatbench.errors import InputError
from flatbench.optim import bases


def build(
    groups: Sequence[dict[str, Any]], lr: float, name: str, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer of that name over parameter groups, which have a ``weight_decay``.

    Muon makes updates of matrices only; AdamW, at the same learning rate, makes those of everything else.

    Raises InputError for a weight decay that the optimizer has not.
    """
    kind = bases.load(name, "optimizer.base")
    arguments = inspect.signature(kind).parameters
    if "weight_decay" not in arguments and any(group["weight_decay"] for group in groups):
        raise InputError(f"optimizer.base: {name} has no weight decay; set train.weight_decay to 0")
    made = bases.as_arguments(options)
    if name != "torch.optim.Muon":
        found: torch.optim.Optimizer = kind(list(groups), lr=lr, **made)
        return found
    parts = []
    for part, chosen in ((True, made), (False, {})):
        own = [{**g, "params": [p for p in g["params"] if (p.ndim == 2) == part]} for g in groups]
        own = [group for group in own if group["params"]]
        if own:
            parts.append((kind if part else torch.optim.AdamW)(own, lr=lr, **chosen))
    return parts[0] if len(parts) == 1 else Joined(parts)


class Joined(torch.optim.Optimizer):
    """Several optimizers, each over parameters of its own, as one: groups and state are theirs."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], parts[-1].defaults)
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            part.state = self.state
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            start = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, to the last part."""
        super().add_param_group(param_group)
        if len(self.param_groups) > sum(len(part.param_groups) for part in self.parts):
            self.parts[-1].param_groups.append(self.param_groups[-1])

    def step(self, closure: Any = None) -> Any:
        """A step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
