"""Data for a checkpoint from whatever a notebook has: loaders, batches, tokenised or plain text examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.labels import IGNORED, count_terms, shifts
from flatbench.subject.subject import LossFunction

Batch = Mapping[str, Tensor]
#: examples in a batch where text is made into batches here
BATCH_SIZE = 32
#: names under which examples hold their label
LABELS = ("labels", "label")


def splits_of(
    data: Any, find_tokenizer: Callable[[], Any], model: nn.Module, device: torch.device
) -> dict[str, list[Batch]]:
    """Split -> batches on a device.

    Args:
        data: one source, which is called ``train``, or a mapping of splits to sources. A source is a data
            loader or another iterable of batches (mappings of tensors, or pairs of inputs and targets), or
            examples: mappings with text in one or two of their columns, or with ``input_ids``, and a label.
        find_tokenizer: gives the tokenizer, for examples only.

    Raises InputError for a source of no such kind, or an empty one.
    """
    if data is None:
        return {}
    sources = dict(data) if isinstance(data, Mapping) else {"train": data}
    return {
        str(split): _batches(source, str(split), find_tokenizer, model, device)
        for split, source in sources.items()
    }


def _batches(
    source: Any, split: str, find_tokenizer: Callable[[], Any], model: nn.Module, device: torch.device
) -> list[Batch]:
    if isinstance(source, str | bytes | Tensor) or not isinstance(source, Iterable):
        raise InputError(f"data: {split}: a {type(source).__name__}; give batches or examples")
    entries = list(source)
    if not entries:
        raise InputError(f"data: {split}: there are no examples")
    first = entries[0]
    if isinstance(first, Mapping) and not all(isinstance(v, Tensor) and v.ndim for v in first.values()):
        entries = _collate(entries, split, find_tokenizer(), shifts(model))
    return [_to_device(entry, split, device) for entry in entries]


def _to_device(entry: Any, split: str, device: torch.device) -> Batch:
    if isinstance(entry, tuple | list) and len(entry) == 2 and all(isinstance(t, Tensor) for t in entry):
        entry = {"inputs": entry[0], "targets": entry[1]}
    if not isinstance(entry, Mapping) or not all(isinstance(v, Tensor) for v in entry.values()):
        raise InputError(
            f"data: {split}: a batch is a mapping of tensors or a pair (inputs, targets), not a "
            f"{type(entry).__name__}"
        )
    return {str(key): value.detach().to(device) for key, value in entry.items()}


def _collate(
    examples: Sequence[Mapping[str, Any]], split: str, tokenizer: Any, causal: bool
) -> list[dict[str, Tensor]]:
    """Batches of examples in their order, padded to the longest of each."""
    first = examples[0]
    texts = [key for key, value in first.items() if isinstance(value, str)][:2]
    label = next((key for key in LABELS if key in first), None)
    if not texts and "input_ids" not in first:
        raise InputError(f"data: {split}: examples with neither text nor input_ids ({', '.join(first)})")
    if label is None and not causal:
        raise InputError(f"data: {split}: examples without a label ({', '.join(first)})")
    batches = []
    for start in range(0, len(examples), BATCH_SIZE):
        part = examples[start : start + BATCH_SIZE]
        encoded = _encode(part, texts, tokenizer)
        if causal:
            encoded["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORED)
        else:
            encoded["labels"] = torch.as_tensor([example[str(label)] for example in part])
        batches.append(encoded)
    return batches


def _encode(part: Sequence[Mapping[str, Any]], texts: Sequence[str], tokenizer: Any) -> dict[str, Tensor]:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if texts:
        columns = [[str(example[key]) for example in part] for key in texts]
        return dict(tokenizer(*columns, padding=True, truncation=True, return_tensors="pt"))
    kept = [
        {k: v for k, v in e.items() if k in ("input_ids", "attention_mask", "token_type_ids")} for e in part
    ]
    return dict(tokenizer.pad(kept, return_tensors="pt"))


def loss_of(model: nn.Module, criterion: Callable[..., Tensor] | None) -> LossFunction:
    """(model, batch) -> (mean loss, number of terms it is the mean of).

    The model's own loss where it computes one from its labels; else ``criterion(outputs, targets)``, the mean
    over the targets, for batches that were pairs or have labels.
    """
    shifted = shifts(model)

    def own(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        output = model(**batch)
        if getattr(output, "loss", None) is None:
            raise InputError("the model gives no loss for these batches; they need labels, or give loss=")
        return output.loss, count_terms(batch["labels"], shifted)

    def given(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        assert criterion is not None
        key = next((k for k in ("targets", *LABELS) if k in batch), None)
        if key is None:
            raise InputError("loss=: the batches hold neither targets nor labels to compare with")
        rest = {k: v for k, v in batch.items() if k != key}
        output = model(rest["inputs"]) if set(rest) == {"inputs"} else model(**rest)
        output = output if isinstance(output, Tensor) else output.logits
        return criterion(output, batch[key]), count_terms(batch[key], shifted=False)

    return own if criterion is None else given


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of the examples whose largest logit is that of their label."""
    return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}


def metric_of(data: Mapping[str, Sequence[Batch]]) -> Callable[[Tensor, Tensor], dict[str, float]] | None:
    """Accuracy where labels are classes of examples; nothing else is guessed."""
    for batches in data.values():
        for batch in batches:
            labels = next((batch[k] for k in ("targets", *LABELS) if k in batch), None)
            if labels is None or labels.ndim != 1 or labels.is_floating_point():
                return None
    return accuracy if data else None
