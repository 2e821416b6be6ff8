"""Moments of Adam and AdamW, of a live optimizer or a saved state, and the next update that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import get_parameter_names

from flatbench.errors import InputError

#: file in which transformers' Trainer keeps its optimizer's state
STATE_FILE = "optimizer.pt"
#: optimizers whose update is known here; a paged or an eight-bit one keeps other things under other names
_KNOWN = ("AdamW", "Adam")
#: parameters whose names match one of these are not decayed by transformers' Trainer
_NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


@dataclass(frozen=True)
class Moments:
    """What AdamW keeps of one parameter, and the settings of its group.

    Attributes:
        first, second: moving averages of the gradient and of its square; None before the first step.
        steps: steps that were taken.
        share: the group's learning rate relative to the largest of all groups.
        decoupled: weight decay is added to the update (AdamW), not to the gradient (Adam).
    """

    first: Tensor | None = None
    second: Tensor | None = None
    steps: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    share: float = 1.0
    decoupled: bool = True

    def update(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Δ of the next step ``w ← w − η·Δ`` with this gradient (arXiv 1711.05101, Algorithm 2)."""
        if self.weight_decay and not self.decoupled:
            gradient = gradient + self.weight_decay * weight
        one, two = self.betas
        first = gradient * (1 - one)
        second = gradient.square() * (1 - two)
        if self.first is not None and self.second is not None:
            first = first + one * self.first.to(gradient)
            second = second + two * self.second.to(gradient)
        steps = self.steps + 1
        scale = (second / (1 - two**steps)).sqrt() + self.eps
        moved: Tensor = first / (1 - one**steps) / scale
        if self.weight_decay and self.decoupled:
            moved = moved + self.weight_decay * weight
        return moved * self.share


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's state as directions need it.

    Attributes:
        moments: by the parameters' names in the model.
        source: where it comes from, in words.
        average: Ê of EFlat-LoRA in the order of its factors; None without one, as before its first step.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    source: str = "one gradient"
    average: Sequence[Tensor] | None = None


def of_optimizer(optimizer: Any, model: nn.Module) -> OptimizerState | None:
    """The state of the optimizer that trains a model; None where it is no Adam and no AdamW at its core."""
    average, inner = None, optimizer
    while True:
        if callable(getattr(inner, "average_perturbation", None)):
            average = inner.average_perturbation()
        # accelerate's and Lightning's wrappers have an ``optimizer``, methods of flatbench a ``base``
        following = vars(inner).get("optimizer") or vars(inner).get("_optimizer") or vars(inner).get("base")
        if following is None or not hasattr(following, "param_groups"):
            break
        inner = following
    if type(inner).__name__ not in _KNOWN:
        return None
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in inner.param_groups:
        for p in group["params"]:
            if id(p) in names:
                found[names[id(p)]] = _moments(
                    inner.state.get(p, {}), group, inner.param_groups, type(inner).__name__ == "AdamW"
                )
    begun = any(m.steps for m in found.values())
    return OptimizerState(found, "live optimizer" if begun else "one gradient", average)


def state_file(folder: Path) -> Path | None:
    """What transformers' Trainer saved of its optimizer in a checkpoint; None where it saved nothing."""
    path = folder / STATE_FILE
    return path if path.is_file() else None


def of_checkpoint(path: Path, model: nn.Module) -> OptimizerState | None:
    """The state in a file that transformers' Trainer saved; None where it is of no Adam.

    The file holds parameters by number. They are taken in the two groups that the Trainer makes, decayed and
    not decayed, or, of an optimizer that was handed to it, in the model's order; the shapes have to agree.

    Raises InputError where the state is damaged, or of other parameters than the model's that train.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        groups, kept = state["param_groups"], state["state"]
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise InputError(f"{path}: no optimizer's state ({' '.join(str(error).split())[:200]})") from error
    if not any("exp_avg" in entry for entry in kept.values()):
        return None
    names = _names(model, groups, kept)
    if names is None:
        raise InputError(f"{path}: a state of other parameters than those of the model that train")
    found = {}
    for group in groups:
        for number in group["params"]:
            found[names[number]] = _moments(kept.get(number, {}), group, groups, True)
    own = state.get("flatbench")
    average = own.get("average") if isinstance(own, Mapping) else None
    return OptimizerState(found, "saved state", average)


def _names(model: nn.Module, groups: Sequence[Any], kept: Mapping[int, Any]) -> dict[int, str] | None:
    """The parameter of each number in a saved state."""
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NOT_DECAYED))
    orders = [
        [*(n for n in training if n in decayed), *(n for n in training if n not in decayed)],
        [*training],
    ]
    numbers = [number for group in groups for number in group["params"]]
    for order in orders if len(groups) == 2 else orders[::-1]:
        if len(order) == len(numbers) and all(
            kept[number]["exp_avg"].shape == training[name].shape
            for number, name in zip(numbers, order, strict=True)
            if number in kept
        ):
            return dict(zip(numbers, order, strict=True))
    return None


def _moments(entry: Mapping[str, Any], group: Any, groups: Sequence[Any], decoupled: bool) -> Moments:
    largest = max(float(g.get("initial_lr", g["lr"])) for g in groups)
    own = float(group.get("initial_lr", group["lr"]))
    return Moments(
        first=entry.get("exp_avg"),
        second=entry.get("max_exp_avg_sq", entry.get("exp_avg_sq")),
        steps=float(entry.get("step", 0.0)),
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        eps=float(group["eps"]),
        weight_decay=float(group.get("weight_decay", 0.0)),
        share=own / largest if largest else 1.0,
        decoupled=bool(group.get("decoupled_weight_decay", decoupled)),
    )
