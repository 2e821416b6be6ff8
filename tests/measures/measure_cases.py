"""Tiny subjects in float64, with ragged batches, on which every measure is tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from flatbench.models import factors as adapters
from flatbench.subject.subject import Subject

TRAINING = {
    "step_seconds": [0.5] * 5 + [0.001 * i for i in range(1, 12)],
    "gradients_per_step": 2,
    "peak_memory_bytes": 250_000_000,
    "peak_memory_source": "rss",
    "trainable_parameters": 123,
    "train_seconds": 4.5,
    "clock": "wall clock",
    "device": "some processor",
    "threads": 1,
    "jobs": 2,
    "energy_joules": 31.5,
    "energy_source": "rapl packages, whole machine",
    "energy_missing": None,
    "core_wait_share": 0.01,
}
SIZES = (5, 5, 3)


def mean_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    return model(**batch).loss, len(batch["labels"])


def vit(**options: Any) -> nn.Module:
    config = {
        "hidden_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 4,
        "patch_size": 2,
        "num_channels": 1,
        "num_labels": 3,
        "hidden_dropout_prob": 0.3,
    }
    return ViTForImageClassification(ViTConfig(**config, **options))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=11,
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=6, n_layer=1, n_head=2, n_positions=8))


class MLP(nn.Module):
    """A classifier in the manner of transformers, with a smooth activation and an unused weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(2, 2)
        self.normal = nn.BatchNorm1d(5)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.last(torch.tanh(self.normal(self.first(pixel_values))))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def images(*shape: int) -> list[dict[str, Tensor]]:
    return [
        {"pixel_values": torch.randn(n, *shape).double(), "labels": torch.randint(0, 3, (n,))} for n in SIZES
    ]


def sentences() -> list[dict[str, Tensor]]:
    return [
        {
            "input_ids": torch.randint(0, 11, (n, 7)),
            "attention_mask": (torch.arange(7) < torch.randint(3, 8, (n, 1))).long(),
            "labels": torch.randint(0, 3, (n,)),
        }
        for n in SIZES
    ]


def texts() -> list[dict[str, Tensor]]:
    ids = [torch.randint(0, 11, (n, 7)) for n in SIZES]
    return [{"input_ids": part, "labels": part} for part in ids]


def lora(model: nn.Module, targets: list[str], saved: list[str] | None = None, **options: Any) -> nn.Module:
    """Adapted, with a B that is not zero, so that the adapter says something."""
    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.2, target_modules=targets, modules_to_save=saved, **options
    )
    adapted = peft.get_peft_model(model, config)
    for factors in adapters.lora_factors(adapted):
        nn.init.normal_(factors.B, std=0.3)
    return adapted


@dataclass(frozen=True)
class Case:
    build: Any
    batches: Any
    targets: list[str]


CASES = {
    "vit_lora": Case(lambda: lora(vit(), ["q_proj", "v_proj"]), lambda: images(1, 4, 4), []),
    "vit_head": Case(lambda: lora(vit(), ["q_proj", "v_proj"], ["classifier"]), lambda: images(1, 4, 4), []),
    "bert_lora": Case(lambda: lora(bert(), ["query", "value"], ["classifier"]), sentences, []),
    "gpt2_lora": Case(lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True), texts, []),
    "dora": Case(lambda: lora(vit(), ["q_proj"], use_dora=True), lambda: images(1, 4, 4), []),
    "vit_full": Case(vit, lambda: images(1, 4, 4), ["q_proj", "v_proj"]),
    "mlp_lora": Case(lambda: lora(MLP(), ["first", "last"]), lambda: images(4), []),
    "mlp_full": Case(MLP, lambda: images(4), ["first", "last"]),
}


def subject(name: str) -> Subject:
    """A subject left in a state that a careless measure would change."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        case = CASES[name]
        model = case.build().double()
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # away from the near-zero weights of a fresh model
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        batches = case.batches()
    model.train()
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    adapted = adapters.adapted_modules(model, case.targets)
    return Subject(model, batches, mean_loss, adapted, seed=11, training=TRAINING)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model and of the random state that a measure must leave alone."""
    return {
        "state": {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "objects": {n: id(p) for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "grad_objects": {n: id(p.grad) for n, p in model.named_parameters() if p.grad is not None},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "attention": {
            n: m.config._attn_implementation
            for n, m in model.named_modules()
            if hasattr(getattr(m, "config", None), "_attn_implementation")
        },
        "rng": torch.get_rng_state(),
    }


def same(left: Any, right: Any) -> bool:
    """Whether two snapshots are equal, bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return left == right
