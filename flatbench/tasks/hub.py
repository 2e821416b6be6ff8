"""Data sets from the hub, with one error for whatever keeps them from being had."""

from __future__ import annotations

from typing import Any

import datasets

from flatbench.errors import InputError


def load(name: str, configuration: str | None, *, revision: str | None, instead: str, **options: Any) -> Any:
    """A data set, or one split of it where ``split=`` is given.

    Raises InputError that ends in ``instead``: what to do with no network.
    """
    try:
        return datasets.load_dataset(name, configuration, revision=revision, **options)
    except Exception as error:  # whatever datasets or the hub's client raises, offline above all
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"data: {name}: neither a local folder nor to be had from the hub: {reason}; "
            f"with no network, {instead}"
        ) from error
