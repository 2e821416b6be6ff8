"""The loss of models in the manner of transformers, with the number of its terms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.labels import count_terms, shifts


def transformers_loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """``model(**batch).loss`` and how many terms it is the mean of.

    The terms are told by `flatbench.labels`. Raises InputError for a batch without ``labels``.
    """
    if "labels" not in batch:
        raise InputError(
            f"the batches ({', '.join(batch)}) hold no 'labels', by which the terms of a loss are counted; "
            "give loss=, which returns the mean loss and the number of its terms"
        )
    loss: Tensor = model(**batch).loss
    labels: Tensor = batch["labels"]
    return loss, count_terms(labels, shifts(model))
