"""The loss of models in the manner of transformers, with the number of its terms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: the label that transformers' losses leave out
IGNORED = -100


def transformers_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """``model(**batch).loss`` and how many terms it is the mean of.

    The terms are the labels that are not -100; a causal language model predicts each token from those before
    it, so that the first of a row is no term.
    """
    loss: Tensor = model(**batch).loss
    labels: Tensor = batch["labels"]
    if labels.is_floating_point():
        return loss, labels.numel() if labels.ndim == 1 else len(labels)
    wrapped: Any = model
    inner = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(inner).__name__
    if labels.ndim == 2 and ("CausalLM" in kind or "LMHead" in kind):
        labels = labels[:, 1:]
    return loss, int(labels.ne(IGNORED).sum())
