"""Examples of other splits that are in the training split as well, as in some published files."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any


def repeats(inputs: Mapping[str, Iterable[Hashable]]) -> dict[str, Any]:
    """For `Task.describe`: ``also_in_train``, split -> its examples whose input is in ``train`` too.

    Args:
        inputs: split -> what is given of each example, without its label, which may differ.

    Returns:
        Nothing to add where no example is repeated.
    """
    train = set(inputs["train"])
    counts = {name: sum(one in train for one in own) for name, own in inputs.items() if name != "train"}
    found = {name: count for name, count in counts.items() if count}
    return {"also_in_train": found} if found else {}
