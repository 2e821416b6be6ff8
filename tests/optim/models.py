"""Small models that the optimizers are tested on."""

from __future__ import annotations

from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

from flatbench.models.factors import lora_factors
from tests.optim.reference import Layer


class TwoLayers(nn.Module):
    """Layers of three shapes with a dropout between them, tanh for curvature."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(20, 24)
        self.second = nn.Linear(24, 24)
        self.third = nn.Linear(24, 18)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.third(torch.tanh(self.second(x)))))


def adapted(
    r: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0, rslora: bool = False, dropout: float = 0.0
) -> nn.Module:
    """A peft model with B = 0 and a head that trains."""
    torch.manual_seed(seed)
    targets = ["first", "second", "third"]
    config = peft.LoraConfig(
        r=r, lora_alpha=3 * r, target_modules=targets, modules_to_save=["head"], use_rslora=rslora
    )
    return peft.get_peft_model(TwoLayers(dropout), config).to(dtype)


def problem(model: nn.Module, seed: int = 1, batch: int = 32) -> Callable[[], Tensor]:
    """A closure over fixed data: clears the gradients, runs forward and backward, returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(batch, 20, generator=generator).to(dtype)
    y = torch.randint(0, 3, (batch,), generator=generator)

    def closure() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def layers(model: nn.Module) -> list[Layer]:
    return [Layer(f.A, f.B, f.scaling) for f in lora_factors(model)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
