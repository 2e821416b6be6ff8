"""Models whose weights are shared, with adapters on one side or on all, and their functions told plainly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = 17


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=WORDS, n_positions=8))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WORDS,
            d_model=8,
            d_kv=4,
            d_ff=8,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=True,
        )
    )


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )


def albert() -> nn.Module:
    return AlbertForSequenceClassification(
        AlbertConfig(
            vocab_size=WORDS,
            embedding_size=6,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            num_labels=3,
        )
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
            tie_word_embeddings=True,
        )
    )


class Halves(nn.Module):
    """Two layers whose parameters are two objects over one memory, and a module that stands in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS, bias=False)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.first
        self.double()
        self.head.weight.data = self.words.weight.data
        self.last.weight.data = self.first.weight.data

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = torch.tanh(self.first(self.words(input_ids)))
        logits = self.head(self.last(torch.tanh(self.again(x))))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return type("Output", (), {"loss": loss, "logits": logits})


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    targets: list[str]
    options: dict[str, Any]
    causal: bool = True


CASES = {
    "gpt2 wte": Case(gpt2, ["wte"], {}),
    "gpt2 head": Case(gpt2, ["lm_head"], {}),
    "gpt2 both": Case(gpt2, ["wte", "lm_head", "c_attn"], {"fan_in_fan_out": True}),
    "gpt2 tied adapters": Case(gpt2, ["wte", "lm_head"], {"ensure_weight_tying": True}),
    "gpt2 head saved": Case(gpt2, ["c_attn"], {"modules_to_save": ["lm_head"], "fan_in_fan_out": True}),
    "gpt2 dora": Case(gpt2, ["wte", "lm_head"], {"use_dora": True}),
    "t5 shared": Case(t5, ["shared"], {}),
    "t5 all": Case(t5, ["shared", "lm_head", "embed_tokens", "q"], {}),
    "bert decoder": Case(bert, ["decoder"], {}),
    "bert both": Case(bert, ["decoder", "word_embeddings", "query"], {}),
    "albert": Case(albert, ["query", "value"], {}, causal=False),
    "llama replicated": Case(llama, ["q_proj", "lm_head"], {"layer_replication": [(0, 2), (0, 2)]}),
    "llama embedding": Case(llama, ["embed_tokens"], {}),
    "two over one memory": Case(Halves, ["head", "first"], {}),
    "module in two places": Case(Halves, ["first"], {}),
}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The adapted model in float64, its adapter away from zero, and a batch."""
    case = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # in double precision first: converting an adapter afterwards would untie what peft ties
        model = case.build().double()
        for p in {p.data_ptr(): p for p in model.parameters()}.values():
            p.data.add_(torch.randn_like(p), alpha=0.3)
        adapted: Any = peft.get_peft_model(
            model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=case.targets, **case.options)
        )
        for key, p in adapted.named_parameters():
            if "lora_" in key:
                p.data.normal_(std=0.5)
            p.data = p.data.double()
        ids = torch.randint(1, WORDS, (5, 6))
        labels = ids if case.causal else torch.randint(0, 3, (5,))
    return adapted.train(), {"input_ids": ids, "labels": labels}


def on_logits(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """A loss of the logits in the model's own precision; transformers' losses are taken in float32."""
    logits = model(**batch).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits.log_softmax(-1) * weights).sum(-1).mean() + logits.square().mean(), len(logits)
