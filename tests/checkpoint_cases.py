"""Small models of transformers, batches of tokens, and losses taken plainly, for tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from flatbench.labels import IGNORED
from flatbench.notebook.checkpoint import Checkpoint

WORDS = 19
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
}
cross_entropy = nn.functional.cross_entropy


def made(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = kind(config).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def bert(kind: Any = BertForSequenceClassification, **config: Any) -> nn.Module:
    return made(kind, BertConfig(**{**BERT, **config}))


def gpt2(**config: Any) -> nn.Module:
    shape = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": WORDS}
    return made(GPT2LMHeadModel, GPT2Config(bos_token_id=0, eos_token_id=0, **shape, **config))


def ids(*lengths: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask."""
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, WORDS, mask.shape, generator=generator) * mask, mask


def token_batches(share: float = 0.5) -> list[dict[str, Tensor]]:
    """Ragged batches with labels of some tokens."""
    found = []
    for lengths in ((5, 9, 3), (8, 2), (4, 4, 9, 7)):
        tokens, mask = ids(*lengths)
        generator = torch.Generator().manual_seed(len(lengths))
        kept = (torch.rand(tokens.shape, generator=generator) < share) & (mask > 0)
        kept[:, 1] = True
        labels = tokens.masked_fill(~kept, IGNORED)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def loss(opened: Checkpoint) -> float:
    return opened.evaluate()["train"]["loss"]


def summed(model: nn.Module, batches: list[dict[str, Tensor]], shifted: bool) -> float:
    """The mean over all tokens with labels, token by token."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch["labels"])):
                length = int(batch["attention_mask"][row].sum())
                found: Any = model(input_ids=batch["input_ids"][row : row + 1, :length])
                logits = getattr(found, "logits", found)[0].log_softmax(-1)
                for place, label in enumerate(batch["labels"][row, :length].tolist()):
                    if label != IGNORED and (place or not shifted):
                        total -= float(logits[place - shifted, label])
                        count += 1
    return total / count


def class_batches(label: str = "labels") -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    return [
        {"inputs": torch.randn(n, 4, dtype=torch.float64), label: torch.randint(0, 3, (n,))}
        for n in (5, 5, 2)
    ]
