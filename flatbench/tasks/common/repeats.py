"""Examples that are in two splits, as in some published files: they may be learned by heart."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any


def repeats(inputs: Mapping[str, Iterable[Hashable]]) -> dict[str, Any]:
    """For `Task.describe`: ``also_in_train``, split -> its examples whose input is in ``train`` too;
    ``also_in_validation`` likewise, of the test sets.

    Args:
        inputs: split -> what is given of each example, without its label, which may differ.

    Returns:
        Nothing to add where no example is repeated.
    """
    held = {name: list(own) for name, own in inputs.items()}
    found: dict[str, Any] = {}
    for earlier, others in (("train", {"train"}), ("validation", {"train", "validation"})):
        known = set(held.get(earlier, ()))
        counts = {name: sum(one in known for one in own) for name, own in held.items() if name not in others}
        if any(counts.values()):
            found[f"also_in_{earlier}"] = {name: count for name, count in counts.items() if count}
    return found


def same_text(*texts: str) -> tuple[str, ...]:
    """What texts have in common that differ in case and white space alone, as many tokenizers see them."""
    return tuple(" ".join(text.split()).casefold() for text in texts)
