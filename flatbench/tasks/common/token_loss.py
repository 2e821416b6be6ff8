"""Losses that are means over tokens: padding, which tokens count, and how a split is evaluated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.labels import IGNORED, aligned, count_terms, counted
from flatbench.tasks.base import Batch


def padded(rows: Sequence[Sequence[int]], value: int, left: bool) -> Tensor:
    """Rows of different lengths as one int64 tensor ``(N, longest)``."""
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    pairs = zip(fill, rows, strict=True)
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in pairs])


def token_accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of counted tokens that are the most likely one, from logits ``(N, T, vocabulary)``.

    ``labels`` ``(N, T)`` stand where the logits that predict them stand.
    """
    kept = counted(labels)
    return {"token_accuracy": float((logits.argmax(-1) == labels)[kept].double().mean())}


def in_place(logits: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Logits and labels of the tokens that are predicted, each where the other stands.

    Args:
        shifted: whether a token's logits stand one place before its label, as a decoder's do.
    """
    return (logits[:, :-1], aligned(labels, shifted)) if shifted else (logits, labels)


def smoothed(logits: Tensor, labels: Tensor, smoothing: float, shifted: bool) -> Tensor:
    """Mean over counted tokens of ``(1-ε)·(-log p_label) + ε·mean(-log p)``, the mean over the vocabulary.

    Args:
        logits: ``(N, T, vocabulary)``; computed with in float32 at least.
        shifted: whether a token's logits stand one place before its label.
    """
    logits, labels = in_place(logits, labels, shifted)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(
        wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
    )


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    outputs: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]],
    shifted: bool,
) -> dict[str, float]:
    """``loss`` (mean over counted tokens), ``log_likelihood``, ``token_accuracy``, in evaluation mode.

    Args:
        outputs: (model, batch) -> mean loss, and logits ``(N, T, vocabulary)``.
        shifted: whether a token's logits stand one place before its label, as a decoder's do.
    """
    total, right, count = 0.0, 0.0, 0
    with evaluating(model), torch.no_grad(), losses_in_float32(model):
        for batch in batches:
            loss, logits = outputs(model, batch)
            logits, labels = in_place(logits, batch["labels"], shifted)
            terms = count_terms(labels, shifted=False)
            total += float(loss) * terms
            right += token_accuracy(logits, labels)["token_accuracy"] * terms
            count += terms
    return {"loss": total / count, "log_likelihood": -total / count, "token_accuracy": right / count}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the mode that was before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
