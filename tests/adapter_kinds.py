"""A model for every kind of thing that peft adapts, small, in float64, with its adapter away from zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

N = 6


class Around(nn.Module):
    """The module in question between numbers and classes."""

    def __init__(self, module: nn.Module, inputs: Callable[[], Tensor], features: int) -> None:
        super().__init__()
        self.kept, self.head = module, nn.Linear(features, 3)
        self.inputs, self.attention = inputs, isinstance(module, nn.MultiheadAttention)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        found = self.kept(x, x, x)[0] if self.attention else self.kept(x)
        logits = self.head(torch.tanh(found.flatten(1)))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class Product(nn.Module):
    """``x @ P``: the parameter is inputs by outputs."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.P, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.zeros(m))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.P + self.bias


class Experts(nn.Module):
    """Two stacks of three matrices, summed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("bi,eoi->beo", x, self.up))
        return torch.einsum("beo,eio->bi", hidden, self.down)


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape).double()


def words() -> Tensor:
    return torch.randint(0, 7, (N, 3))


@dataclass(frozen=True)
class Kind:
    module: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    features: int
    options: dict[str, Any] = field(default_factory=lambda: {"target_modules": ["kept"]})
    config: Any = peft.LoraConfig


_PARAMETER = {"target_modules": []}
KINDS = {
    "linear": Kind(lambda: nn.Linear(5, 4), numbers(5), 4),
    "linear, r over both": Kind(lambda: nn.Linear(5, 4), numbers(5), 4, {"target_modules": ["kept"], "r": 7}),
    "linear with bias": Kind(
        lambda: nn.Linear(5, 4), numbers(5), 4, {"target_modules": ["kept"], "lora_bias": True}
    ),
    "transposed": Kind(
        lambda: Conv1D(4, 5), numbers(5), 4, {"target_modules": ["kept"], "fan_in_fan_out": True}
    ),
    "conv1d": Kind(lambda: nn.Conv1d(2, 3, 2, stride=2), numbers(2, 6), 9),
    "conv2d": Kind(lambda: nn.Conv2d(2, 3, 2, padding=1), numbers(2, 2, 2), 27),
    "conv2d, r over both": Kind(
        lambda: nn.Conv2d(1, 3, 2), numbers(1, 3, 3), 12, {"target_modules": ["kept"], "r": 5}
    ),
    "conv2d of one point": Kind(lambda: nn.Conv2d(2, 3, 1), numbers(2, 2, 2), 12),
    "conv3d": Kind(lambda: nn.Conv3d(1, 3, 2), numbers(1, 2, 3, 2), 6),
    "conv2d around": Kind(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), numbers(2, 3, 3), 27
    ),
    "conv1d with holes": Kind(lambda: nn.Conv1d(2, 3, 3, dilation=2, padding="same"), numbers(2, 4), 12),
    "normed linear": Kind(lambda: nn.utils.weight_norm(nn.Linear(5, 4)), numbers(5), 4),
    "conv2d in groups": Kind(lambda: nn.Conv2d(2, 4, 2, groups=2), numbers(2, 2, 2), 4),
    "embedding": Kind(lambda: nn.Embedding(7, 4), words, 12),
    "scaled embedding": Kind(lambda: Gemma3TextScaledWordEmbedding(7, 4, None, 3.0), words, 12),
    "attention": Kind(lambda: nn.MultiheadAttention(4, 2, batch_first=True), numbers(3, 4), 12),
    "in_proj_weight": Kind(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        numbers(3, 4),
        12,
        {"target_parameters": ["kept.in_proj_weight"], **_PARAMETER},
    ),
    "parameter": Kind(lambda: Product(5, 4), numbers(5), 4, {"target_parameters": ["kept.P"], **_PARAMETER}),
    "square parameter": Kind(
        lambda: Product(4, 4), numbers(4), 4, {"target_parameters": ["kept.P"], **_PARAMETER}
    ),
    "weight as parameter": Kind(
        lambda: nn.Linear(5, 4), numbers(5), 4, {"target_parameters": ["kept.weight"], **_PARAMETER}
    ),
    "experts": Kind(
        Experts, numbers(4), 4, {"target_parameters": ["kept.up", "kept.down"], **_PARAMETER}
    ),
    "adalora": Kind(
        lambda: nn.Linear(5, 4), numbers(5), 4, {"target_modules": ["kept"], "total_step": 9},
        peft.AdaLoraConfig,
    ),
    "adalora of conv2d": Kind(
        lambda: nn.Conv2d(2, 3, 2), numbers(2, 2, 2), 3, {"target_modules": ["kept"], "total_step": 9},
        peft.AdaLoraConfig,
    ),
    "dora": Kind(lambda: nn.Linear(5, 4), numbers(5), 4, {"target_modules": ["kept"], "use_dora": True}),
}  # fmt: skip


def make(name: str, *, started: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    """The adapted model and a batch.

    Args:
        started: the adapter is away from zero.
    """
    kind = KINDS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = Around(kind.module(), kind.inputs, kind.features).double()
        options = {"r": 2, "lora_alpha": 6, **kind.options}
        adapted: Any = peft.get_peft_model(model, kind.config(**options)).double()
        for key, p in adapted.named_parameters():
            if "lora_" in key and started and "magnitude" not in key:
                p.data.normal_(std=0.4)
        batch = {"x": model.inputs(), "labels": torch.randint(0, 3, (N,))}
    return adapted, batch


def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    return model(**batch).loss, len(batch["labels"])
