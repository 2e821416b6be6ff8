"""Models with every kind of adapter that peft makes, small, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from flatbench.models.factors import LoRAFactors, lora_factors


class Mixed(nn.Module):
    """Words through an embedding, a transposed linear layer and an image through convolutions, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 8)
        self.transposed = Conv1D(10, 8)
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.conv1 = nn.Conv1d(4, 6, 2)
        self.linear = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, words: Tensor, images: Tensor) -> Tensor:
        text = torch.tanh(self.transposed(self.words(words))).mean(1)
        image = torch.tanh(self.conv(images)).flatten(2)
        image = torch.tanh(self.conv1(image)).mean(2)
        return self.head(torch.tanh(self.linear(torch.cat([text, image], 1))))


def mixed(targets: list[str], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": targets, "modules_to_save": ["head"], **options}
    return peft.get_peft_model(Mixed(), peft.LoraConfig(**settings)).double()


def two_adapters() -> nn.Module:
    model: Any = mixed(["linear"])
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["linear", "transposed"]))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


#: name -> model
CASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: mixed(["linear"]),
    "conv1d_of_gpt2": lambda: mixed(["transposed"]),
    "conv2d": lambda: mixed(["conv"]),
    "conv1d": lambda: mixed(["conv1"]),
    "embedding": lambda: mixed(["words"]),
    "all_kinds": lambda: mixed(["linear", "transposed", "conv", "conv1", "words"]),
    "patterns": lambda: mixed(
        ["linear", "transposed"], rank_pattern={"linear": 4}, alpha_pattern={"transposed": 1}
    ),
    "rslora": lambda: mixed(["linear", "transposed"], use_rslora=True),
    "dora": lambda: mixed(["linear", "conv", "transposed"], use_dora=True),
    "two_adapters": two_adapters,
}


def problem(model: nn.Module, seed: int = 1) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 13, (12, 5), generator=generator)
    images = torch.randn(12, 2, 7, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (12,), generator=generator)

    def closure() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(words, images), labels)
        loss.backward()
        return loss

    return closure


def randomised(model: nn.Module) -> nn.Module:
    """With A and B away from zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for f in lora_factors(model):
            for p in (f.A, f.B):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3)
    return model


def dense(f: LoRAFactors, A: Tensor, B: Tensor) -> Tensor:
    """``B·A`` in the shape of the module's weight."""
    product = B.flatten(1) @ A.flatten(1)
    weight = base_weight(f)
    stored = product.T if f.kind == "embedding" or getattr(f.layer, "fan_in_fan_out", False) else product
    return stored.reshape(weight.shape)


def base_weight(f: LoRAFactors) -> nn.Parameter:
    layer: Any = f.layer.get_base_layer()
    weight: nn.Parameter = layer.weight
    return weight


def tied_gpt2(targets: list[str], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=17, n_positions=8)
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", **options)
    # in double precision first: converting an adapter afterwards would untie what peft ties
    return peft.get_peft_model(GPT2LMHeadModel(config).double(), settings)
