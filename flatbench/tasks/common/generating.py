"""Generation by what a study says, and by nothing that a model's folder asks for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import GenerationConfig

from flatbench.errors import InputError
from flatbench.models import pretrained

log = logging.getLogger(__name__)

#: what of a model's own generation settings says which tokens are meant, not how texts are searched for
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@contextlib.contextmanager
def as_told(model: nn.Module) -> Iterator[None]:
    """Inside, ``generate`` takes nothing but special tokens from a ``generation_config.json``.

    Penalties on repetition, least lengths and forced tokens that came with a model would else change what
    "greedy" means, and the scores of all methods, without a word in the study.
    """
    held = [(m, m.generation_config) for m in model.modules() if "generation_config" in vars(m)]
    try:
        for module, own in held:
            tokens = {name: getattr(own, name, None) for name in _TOKENS}
            module.generation_config = GenerationConfig(**tokens)
        yield
    finally:
        for module, own in held:
            module.generation_config = own


def room_for(wanted: int, longest: int, configuration: Any) -> int:
    """How many tokens there are positions for behind the longest prompt, at most as many as wanted.

    Fewer are told in the log. Raises InputError where there are none.
    """
    limit = pretrained.longest_input(configuration)
    if limit is None or longest == 0 or longest + wanted <= limit:
        return wanted
    if longest >= limit:
        raise InputError(f"generation: a prompt of {longest} tokens fills the model's {limit} positions")
    log.warning(
        "generation: texts end after %d tokens, not %d: of %d positions the longest prompt takes %d",
        limit - longest,
        wanted,
        limit,
        longest,
    )
    return limit - longest
