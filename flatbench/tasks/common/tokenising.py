"""Texts made into tokens, with those that are too long cut, and counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)


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


def marks_behind(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts behind every text by itself; most decoders' put none there."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    ends = range(len(whole), len(bare) - 1, -1)
    return next((len(whole) - end for end in ends if whole[end - len(bare) : end] == bare), 0)


def tokenise_prompts(tokenizer: Any, texts: Sequence[str], goes_on: bool) -> list[list[int]]:
    """Tokens of prompts, of which a decoder's go on in the reference.

    A mark of an end that the tokenizer puts behind every text is left out there: the model would have to
    write its answer behind the end of the text. An encoder's texts end with theirs.
    """
    found: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    behind = marks_behind(tokenizer) if goes_on else 0
    if behind:
        end = tokenizer.convert_ids_to_tokens(found[0][-behind:]) if found else []
        log.info("prompts: without %s, which the tokenizer puts behind every text", " ".join(end))
    return [prompt[: len(prompt) - behind] for prompt in found]


def name_of_prompts(tokenizer: Any, goes_on: bool) -> bytes:
    """What `tokenise_prompts` adds to the identity of runs: nothing where it leaves nothing out.

    Runs that earlier versions trained behind such a mark are others; all other runs keep their names.
    """
    return b"without the marks behind prompts\n" if goes_on and marks_behind(tokenizer) else b""
