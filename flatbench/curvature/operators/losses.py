"""The loss of models in the manner of transformers, with the number of its terms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flatbench.labels import count_terms, shifts


def transformers_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """``model(**batch).loss`` and how many terms it is the mean of.

    The terms are told by `flatbench.labels`.
    """
    loss: Tensor = model(**batch).loss
    labels: Tensor = batch["labels"]
    return loss, count_terms(labels, shifts(model))
