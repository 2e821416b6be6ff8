"""Examples that are in two splits, as in some published files: they may be learned by heart."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from flatbench.config.words import folded


def repeats(inputs: Mapping[str, Iterable[Hashable]]) -> dict[str, Any]:
    """For `Task.describe`: ``also_in_train``, split -> its examples whose input is in ``train`` too;
    ``also_in_validation`` likewise, of the test sets.

    Args:
        inputs: split -> what is given of each example, without its label, which may differ.

    Returns:
        Nothing to add where no example is repeated.
    """
    later = {name: list(own) for name, own in inputs.items() if name != "train"}
    # of the training split only what is repeated is kept
    known = {
        "train": set().union(*later.values()).intersection(inputs["train"]),
        "validation": set(later.get("validation", ())),
    }
    found: dict[str, Any] = {}
    for earlier, seen in known.items():
        counts = {name: sum(one in seen for one in own) for name, own in later.items() if name != earlier}
        if any(counts.values()):
            found[f"also_in_{earlier}"] = {name: count for name, count in counts.items() if count}
    return found


def repeated_texts(texts: Mapping[str, Iterable[Iterable[str]]]) -> dict[str, Any]:
    """`repeats` of examples that are one text or several, whatever their case and white space."""
    return repeats({name: (tuple(map(folded, example)) for example in own) for name, own in texts.items()})
