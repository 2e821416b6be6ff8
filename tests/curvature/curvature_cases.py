"""Small float64 models with batches and losses, and their dense Hessians by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from flatbench.curvature.operators.model_state import as_found
from flatbench.curvature.operators.spaces import spanned

RAGGED = (5, 4, 2)


def on_tuple(model: nn.Module, batch: Any) -> Tensor:
    """A batch's mean loss whose terms are its rows."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def on_mapping(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"]), len(batch["labels"])


def on_tokens(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """Next-token loss over the tokens that are not masked; not in transformers' own float32."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss, int(labels.ne(-100).sum())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def cnn(normal: bool) -> nn.Module:
    middle = [nn.BatchNorm2d(3)] if normal else []
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), *middle, nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
    )


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=6,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=3,
            hidden_dropout_prob=0.3,
        )
    )


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=11,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=6,
            max_position_embeddings=10,
            num_labels=3,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=10))


def lora(model: nn.Module, targets: list[str], **options: Any) -> nn.Module:
    config = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules=targets, **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def rows(sizes: Sequence[int], *shape: int) -> list[Any]:
    return [(torch.randn(n, *shape).double(), torch.randint(0, 3, (n,))) for n in sizes]


def images(sizes: Sequence[int]) -> list[Any]:
    return [{"pixel_values": x, "labels": y} for x, y in rows(sizes, 1, 4, 4)]


def sentences(sizes: Sequence[int]) -> list[Any]:
    made = []
    for n in sizes:
        mask = (torch.arange(9) < torch.randint(2, 8, (n, 1))).long()
        ids, labels = torch.randint(0, 11, (n, 9)), torch.randint(0, 3, (n,))
        made.append(BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels}))
    return made


def texts(sizes: Sequence[int]) -> list[Any]:
    made = []
    for batch in sentences(sizes):
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append({**batch, "labels": labels})
    return made


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    batches: Callable[[Sequence[int]], list[Any]]
    loss: Any
    space: Any = "all"
    sizes: Sequence[int] = RAGGED

    def make(self) -> tuple[nn.Module, list[Any]]:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = self.build().double()
            for parameter in model.parameters():  # away from the near-zero weights of a fresh model
                parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.add_(0.1)
            batches = self.batches(self.sizes)
        return model.train(), batches


def _only_last(name: str) -> bool:
    return name.startswith("2.")


_QV = ["query", "value"]
CASES = {
    "mlp": Case(mlp, lambda s: rows(s, 4), on_tuple),
    "mlp, one batch": Case(mlp, lambda s: rows(s, 4), on_tuple, sizes=(7,)),
    "mlp, last layer": Case(mlp, lambda s: rows(s, 4), on_tuple, space=_only_last),
    "cnn": Case(lambda: cnn(False), lambda s: rows(s, 1, 6, 6), on_tuple),
    "cnn with batch norm": Case(lambda: cnn(True), lambda s: rows(s, 1, 6, 6), on_tuple),
    "vit": Case(vit, images, on_mapping),
    "bert": Case(bert, sentences, on_mapping, space=lambda name: "embeddings" not in name),
    "gpt2, tied, by tokens": Case(gpt2, texts, on_tokens),
    "vit lora, adapter": Case(lambda: lora(vit(), ["q_proj", "v_proj"]), images, on_mapping, "adapter"),
    "vit lora, merged": Case(lambda: lora(vit(), ["q_proj", "v_proj"]), images, on_mapping, "merged"),
    "vit lora, all": Case(lambda: lora(vit(), ["q_proj"]), images, on_mapping, "all"),
    "bert lora, adapter": Case(lambda: lora(bert(), _QV), sentences, on_mapping, "adapter"),
    "bert lora, merged": Case(lambda: lora(bert(), _QV), sentences, on_mapping, "merged"),
    "gpt2 lora, merged": Case(
        lambda: lora(gpt2(), ["c_attn"], fan_in_fan_out=True), texts, on_tokens, "merged"
    ),
    "dora, merged": Case(lambda: lora(vit(), ["q_proj"], use_dora=True), images, on_mapping, "merged"),
}


def flat_loss(case: Case, model: nn.Module, batches: list[Any], parameters: dict[str, nn.Parameter]) -> Any:
    """The exact mean loss as a function of one flat vector, written without any of flatbench's sums."""
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {names[id(p)]: p.shape for p in parameters.values()}

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self) -> Tensor:
            total, count = torch.zeros((), dtype=torch.float64), 0
            for batch in batches:
                found = case.loss(self.inner, batch)
                loss, terms = found if isinstance(found, tuple) else (found, len(batch[1]))
                total, count = total + loss * terms, count + terms
            return total / count

    called = Called()

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = {f"inner.{n}": part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
        return torch.func.functional_call(called, named, ())

    return loss


_DENSE: dict[str, Tensor] = {}


def dense(name: str) -> Tensor:
    """``(n, n)`` Hessian of a case in its space, made once."""
    if name not in _DENSE:
        case = CASES[name]
        model, batches = case.make()
        with as_found(model), spanned(model, case.space) as parameters, sdpa_kernel(SDPBackend.MATH):
            flat = torch.cat([p.detach().flatten() for p in parameters.values()])
            loss = flat_loss(case, model, batches, parameters)
            _DENSE[name] = torch.autograd.functional.hessian(loss, flat, vectorize=True)
    return _DENSE[name]


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    """A random symmetric matrix with the given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * values.double()) @ q.T
