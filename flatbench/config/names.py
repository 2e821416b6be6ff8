"""Names that may become folders."""

from __future__ import annotations

import re
from typing import Any

from flatbench.errors import InputError, shown

#: what may name a study, a method and so a folder: nothing that leaves its parent folder
NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"


def plain_name(name: Any, where: str) -> str:
    """``name`` if it can name a folder. Raises InputError for one that could lead out of its parent."""
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise InputError(
            f"{where}: a study's name is made of letters, digits, '.', '_', '+' and '-', not "
            f"{shown(repr(name))}"
        )
    return name
