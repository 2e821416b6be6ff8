"""Whether a product's peak memory is what the plan says: ten shapes, three budgets each.

Random weights, LoRA r = 8, float32, one thread, on the CPU. For each shape the budgets are the least that is
not refused, one with which all graphs are kept, and the mean of the two. Each budget runs in a process of its
own, as in `benchmarks/llm.py`: the peak is the process's resident size over what it was with the model loaded
and a short product done, where glibc gives freed memory back. ``ratio`` is measured over stated, and
``of_budget`` measured over the budget.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --shapes gpt2_wide bert
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llm
import record
import torch
from torch import Tensor, nn

from flatbench.curvature import HessianOperator
from flatbench.labels import count_terms, shifts

BUDGETS = ("least", "between", "all_kept")
Made = tuple[nn.Module, list[str], Callable[[int], dict[str, Tensor]]]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Mean loss and its terms: shifted labels of causal models, labels that are not -100 of others."""
    return model(**batch).loss, count_terms(batch["labels"], shifts(model))


def _words(count: int, words: int, tokens: int) -> Tensor:
    return torch.randint(5, words, (count, tokens), generator=torch.Generator().manual_seed(1))


def _causal(count: int, words: int, tokens: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(part: int) -> dict[str, Tensor]:
        ids = _words(max(count // part, 1), words, max(tokens // part, 16))
        return {"input_ids": ids, "labels": ids}

    return batch


def _classes(count: int, words: int, tokens: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(part: int) -> dict[str, Tensor]:
        ids = _words(max(count // part, 1), words, tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}

    return batch


def _gpt2(depth: int, width: int, words: int, count: int, tokens: int) -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=words, n_embd=width, n_layer=depth, n_head=width // 64, n_positions=1024)
    return GPT2LMHeadModel(config), ["c_attn"], _causal(count, words, tokens)


def _qwen(depth: int, width: int, words: int, count: int, tokens: int, tied: bool = True) -> Made:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=words, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
        num_attention_heads=width // 64, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen2ForCausalLM(config), ["q_proj", "v_proj"], _causal(count, words, tokens)


def _bert(depth: int, width: int, count: int, tokens: int) -> Made:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64,
        intermediate_size=4 * width, num_labels=3,
    )  # fmt: skip
    return (
        BertForSequenceClassification(config),
        ["query", "value"],
        _classes(count, config.vocab_size, tokens),
    )


def _masked(depth: int, width: int, words: int, count: int, tokens: int) -> Made:
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )  # fmt: skip

    def batch(part: int) -> dict[str, Tensor]:
        ids = _words(max(count // part, 1), words, tokens)
        labels = ids.masked_fill(torch.arange(tokens) % 7 != 0, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return RobertaForMaskedLM(config), ["query", "value"], batch


def _vit(depth: int, width: int, count: int) -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64,
        intermediate_size=4 * width, num_labels=10,
    )  # fmt: skip

    def batch(part: int) -> dict[str, Tensor]:
        images = torch.randn(max(count // part, 1), 3, 224, 224, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": images, "labels": torch.arange(len(images)) % 10}

    model = ViTForImageClassification(config)
    targets = [
        name
        for name in ("query", "value", "q_proj", "v_proj")
        if any(m.endswith(f".{name}") for m, _ in model.named_modules())
    ]
    return model, targets, batch


def _t5(depth: int, width: int, words: int, count: int, tokens: int) -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=words, d_model=width, d_ff=4 * width, d_kv=64, num_heads=width // 64, num_layers=depth,
        decoder_start_token_id=0,
    )  # fmt: skip

    def batch(part: int) -> dict[str, Tensor]:
        ids = _words(max(count // part, 1), words, tokens)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": ids[:, : tokens // 2].contiguous(),
        }

    return T5ForConditionalGeneration(config), ["q", "v"], batch


#: name -> how it is made, and the space
SHAPES: dict[str, tuple[Callable[[], Made], str]] = {
    "gpt2_deep": (lambda: _gpt2(12, 384, 8_000, 2, 512), "adapter"),
    "gpt2_wide": (lambda: _gpt2(4, 768, 50_257, 1, 512), "adapter"),
    "gpt2_merged": (lambda: _gpt2(6, 512, 20_000, 2, 384), "merged"),
    "qwen_tied": (lambda: _qwen(6, 512, 60_000, 2, 384), "adapter"),
    "qwen_untied": (lambda: _qwen(8, 512, 20_000, 1, 512, tied=False), "merged"),
    "bert": (lambda: _bert(12, 384, 2, 512), "adapter"),
    "bert_merged": (lambda: _bert(4, 768, 2, 384), "merged"),
    "masked": (lambda: _masked(6, 512, 30_000, 2, 384), "adapter"),
    "vit": (lambda: _vit(12, 768, 2), "adapter"),
    "t5": (lambda: _t5(4, 512, 16_000, 2, 384), "adapter"),
}


def child(shape: str, budget: str) -> dict[str, Any]:
    """Stated and measured peak of a product in a budget."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    make, space = SHAPES[shape]
    base, targets, batches = make()
    model = llm.adapted(base, targets, fan_in_fan_out="gpt2" in shape)

    def operator(batch: Any, memory: int) -> HessianOperator:
        return HessianOperator(model, loss, [batch], space=space, memory=memory, products="exact")

    def kept() -> int:
        with operator(batches(1), llm.MUCH) as made:
            # graphs get two thirds of a budget, vectors the rest
            return int(1.53 * made.plan.peak_bytes + 6 * made.dimension * 4)

    memory = llm.least(operator(batches(1), llm.LITTLE))
    if budget != "least":
        most = kept()
        memory = most if budget == "all_kept" else (memory + most) // 2
    found = llm.timed(lambda rows: llm.entered(operator(rows, memory)), batches(1), batches(8), products=1)
    measured, stated = found["memory_bytes"], found["stated_bytes"]
    return {
        "budget_bytes": memory,
        "stated_bytes": stated,
        "measured_bytes": measured,
        "ratio": measured / stated,
        "of_budget": measured / memory,
        "way": found["way"],
        "plan": found["plan"],
        "seconds": found["seconds"],
    }


def main() -> None:
    """Measure every budget of every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    path = arguments.results / "memory_plan.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for shape in arguments.shapes:
        for budget in BUDGETS:
            found = llm.told_by([__file__, "--child", shape, budget])
            results.setdefault(shape, {})[budget] = found
            print(shape, budget, found, flush=True)
            ratios = [
                one["ratio"]
                for name in SHAPES
                for one in results.get(name, {}).values()
                if isinstance(one, dict) and "ratio" in one
            ]
            results["within_10_percent"] = [sum(0.9 <= r <= 1.1 for r in ratios), len(ratios)]
            record.write("memory_plan", results, arguments.results)


if __name__ == "__main__":
    main()
