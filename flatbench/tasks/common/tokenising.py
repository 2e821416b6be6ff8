"""Texts made into tokens, with those that are too long cut, and counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tokenise(
    tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int | None
) -> tuple[list[dict[str, Any]], int]:
    """What the tokenizer makes of each text or pair of texts, and of how many a part was cut off.

    Args:
        columns: one or two columns of texts, of equal length.
        max_length: tokens per example, special ones included; None for no limit.
    """
    # first without a limit, or what was cut could not be counted
    whole = tokenizer(*map(list, columns), truncation=False, verbose=False)
    features = [{key: whole[key][i] for key in whole} for i in range(len(columns[0]))]
    too_long = [i for i, f in enumerate(features) if max_length and len(f["input_ids"]) > max_length]
    if too_long:
        parts = [[column[i] for i in too_long] for column in columns]
        cut = tokenizer(*parts, truncation=True, max_length=max_length)
        for place, i in enumerate(too_long):
            features[i] = {key: cut[key][place] for key in cut}
    return features, len(too_long)
