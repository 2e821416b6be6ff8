"""Data sets from the hub, with one error for whatever keeps them from being had."""

from __future__ import annotations

import pkgutil
from typing import Any

import datasets
import datasets.packaged_modules

from flatbench.errors import InputError


def load(name: str, configuration: str | None, *, revision: str | None, instead: str, **options: Any) -> Any:
    """A data set, or one split of it where ``split=`` is given.

    Raises InputError that ends in ``instead``: what to do with no network.
    """
    readers = {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}
    if name in readers:  # `datasets` would read whatever files of this kind the working directory holds
        raise InputError(f"data: {name}: not the name of a data set; give a folder or OWNER/NAME")
    try:
        return datasets.load_dataset(name, configuration, revision=revision, **options)
    except Exception as error:  # whatever datasets or the hub's client raises, offline above all
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"data: {name}: neither a local folder nor to be had from the hub: {reason}; "
            f"with no network, {instead}"
        ) from error
