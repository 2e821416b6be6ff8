"""Models whose own code may run: only those that the user names on the command line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator

from flatbench.errors import InputError

#: holds the names as a JSON list; worker processes inherit it
VARIABLE = "FLATBENCH_TRUST"


def grant(models: Iterable[str]) -> None:
    """From now on, in this process and those that it starts, these models and no others are trusted."""
    names = sorted(set(models))
    if names:
        os.environ[VARIABLE] = json.dumps(names)
    else:
        os.environ.pop(VARIABLE, None)


def granted() -> frozenset[str]:
    """The models that are trusted, as studies name them."""
    try:
        names = json.loads(os.environ.get(VARIABLE, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"${VARIABLE}: expected a JSON list of models' names")
    return frozenset(names)


@contextlib.contextmanager
def granting(models: Iterable[str]) -> Iterator[None]:
    """These models are trusted too until the block ends."""
    before = os.environ.get(VARIABLE)
    grant({*granted(), *models})
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


def check(model: str) -> None:
    """Raise InputError unless the user named the model."""
    if model not in granted():
        raise InputError(
            f"model.trust_remote_code: the code that comes with {model} is run only if you name the model "
            f"yourself: --trust-remote-code {model}"
        )
