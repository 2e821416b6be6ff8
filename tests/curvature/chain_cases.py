"""Small models that are chains of blocks, and small models that only look like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from flatbench.curvature import HessianOperator
from flatbench.curvature.operators.loss_operator import LossOperator
from tests.curvature.curvature_cases import on_tokens

V = 11


def gpt2(layers: int = 4, width: int = 4, **options: Any) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=width, n_layer=layers, n_head=2, n_positions=12, **options)
    )


def _shape(layers: int, width: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
        "intermediate_size": width + 2,
    }  # fmt: skip


def _decoder(kind: Any, config: Any, layers: int, width: int, tied: bool) -> nn.Module:
    found: nn.Module = kind(
        config(
            vocab_size=V,
            num_key_value_heads=1,
            max_position_embeddings=12,
            tie_word_embeddings=tied,
            **_shape(layers, width),
        )
    )
    return found


def llama(layers: int = 4, width: int = 4) -> nn.Module:
    return _decoder(LlamaForCausalLM, LlamaConfig, layers, width, tied=False)


def qwen2(layers: int = 4, width: int = 4) -> nn.Module:
    return _decoder(Qwen2ForCausalLM, Qwen2Config, layers, width, tied=True)


def masked_bert(layers: int = 4, width: int = 4) -> nn.Module:
    return BertForMaskedLM(BertConfig(vocab_size=V, max_position_embeddings=12, **_shape(layers, width)))


def roberta(layers: int = 4, width: int = 4) -> nn.Module:
    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=V, max_position_embeddings=14, num_labels=3, pad_token_id=0, **_shape(layers, width)
        )
    )


def bart() -> nn.Module:
    shape = {
        f"{part}_{what}": count
        for part in ("encoder", "decoder")
        for what, count in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 6))
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=V, d_model=4, max_position_embeddings=12, **shape)
    )


def on_labels(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    logits = model(input_ids=batch["input_ids"], labels=batch["labels"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), batch[
        "labels"
    ].numel()


def vit(layers: int = 4, width: int = 4) -> nn.Module:
    config = ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, **_shape(layers, width))
    return ViTForImageClassification(config)


def shaken(model: nn.Module) -> nn.Module:
    """In float64, away from the near-zero weights of a fresh model."""
    model = model.double()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def on_masked(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Cross entropy of each token, not in transformers' own float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), batch["labels"].view(-1))
    return loss, int(batch["labels"].ne(-100).sum())


# -- what only looks like a chain ---------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Plain(nn.Module):
    """Embedding, blocks, head; ``between`` says how the blocks are called."""

    def __init__(
        self, between: Callable[[nn.ModuleList, Tensor], Tensor], block: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(4, 3)
        self._between = between

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self._between(self.blocks, self.stem(x)))
        return found


def in_a_row(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def called_twice(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return in_a_row(blocks, in_a_row(blocks, x))


def scaled_between(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x) * 0.9
    return x


def skipping(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """What the second block gave is added behind the last."""
    early = in_a_row(blocks[:2], x)  # type: ignore[arg-type]
    return in_a_row(blocks[2:], early) + 0.1 * early  # type: ignore[arg-type]


class WithValue(Block):
    """Adds what the first block left behind: a value residual."""

    left: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        mine = self.inner(x)
        value = self.left.setdefault("value", mine)
        return x + mine.tanh() + 0.1 * value


def value_residual(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    left: dict[str, Tensor] = {}
    for block in blocks:
        block.left = left  # type: ignore[assignment]
    return in_a_row(blocks, x)


class Gated(Block):
    """Is also given something that the stem made."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.inner(x).tanh() * gate


def gated(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    gate = x.mean().sigmoid()
    for block in blocks:
        x = block(x, gate)
    return x


class Stochastic(Block):
    """Drops values in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.inner(x).tanh(), 0.3, training=True)


# -- operators ---------------------------------------------------------------------------------------------


def tight(make: Callable[..., LossOperator], share: float = 0.6) -> int:
    """A budget in which whole graphs do not fit and some blocks do."""
    with make(memory=10**10) as generous:
        return int(1.5 * share * generous.plan.peak_bytes) + 4 * 8 * generous.dimension


def tokens(rows: int, length: int, seed: int = 3) -> dict[str, Tensor]:
    """Ragged sentences with padding, whose first tokens are no terms."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (rows, length), generator=generator)
    needed = torch.randint(length // 2 + 1, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < needed).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classes(rows: int, length: int, seed: int = 3) -> dict[str, Tensor]:
    """The same with a class a sentence."""
    found = tokens(rows, length, seed)
    return {**found, "labels": torch.arange(rows) % 3}


def causal(model: nn.Module, **options: Any) -> HessianOperator:
    return HessianOperator(model, on_tokens, [tokens(1, 9)], **options)
