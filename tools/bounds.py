"""Constraints of the ends of pyproject.toml's bounds: ``python tools/bounds.py lowest|newest``.

``lowest`` prints every stated lower bound as the only version that may be installed, which fails where one
library asks another for more: a bound is a promise. ``newest`` leaves all to the registry. torch is the
version of ``constraints.txt`` in both: another build would be fetched otherwise. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BOUND = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([^,;\s]+)")


def bounds(extra: str = "dev") -> dict[str, str]:
    """Name -> lower bound of what the package and an extra require, extras that it names included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*extras[extra], *project["dependencies"]]
    for line in extras[extra]:
        if line.startswith(f"{project['name']}["):
            lines += extras[line.split("[")[1].rstrip("]")]
    return {found[1]: found[2] for found in map(_BOUND.match, lines) if found}


def lowest() -> list[str]:
    """``name==version`` for every lower bound."""
    return sorted(f"{name}=={version}" for name, version in bounds().items() if name != "torch")


def torch() -> str:
    """The line of ``constraints.txt`` that pins torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["newest"]):
        sys.exit("usage: python tools/bounds.py lowest|newest")
    print("\n".join([torch(), *(lowest() if sys.argv[1] == "lowest" else [])]))
