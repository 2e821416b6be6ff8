"""Constraints of the ends of pyproject.toml's bounds: ``python tools/bounds.py lowest|newest``.

``lowest`` prints every stated lower bound as the only version that may be installed, which fails where
one library asks another for more: a bound is a promise. ``newest`` leaves all to the registry but deepspeed,
which is installed by its name. torch is the version of ``constraints.txt`` in both: another build would be
fetched otherwise. Needs nothing but Python.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BOUND = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([^,;\s]+)")


def requirements(*extras: str) -> list[str]:
    """What the package and some extras require, extras that they name included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known, lines = project["optional-dependencies"], list(project["dependencies"])
    for extra in extras:
        for line in known[extra]:
            lines.append(line)
            if line.startswith(f"{project['name']}["):
                lines += known[line.split("[")[1].rstrip("]")]
    return lines


def lowest() -> list[str]:
    """``name==version`` for every lower bound."""
    # deepspeed is built within the environment, after the rest
    found = filter(None, map(_BOUND.match, requirements("dev", "deepspeed")))
    return sorted(f"{one[1]}=={one[2]}" for one in found if one[1] != "torch")


def newest() -> list[str]:
    """The upper bounds: what is not required by another package is not bound otherwise."""
    return requirements("deepspeed")[-1:]


def torch() -> str:
    """The line of ``constraints.txt`` that pins torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["newest"]):
        sys.exit("usage: python tools/bounds.py lowest|newest")
    print("\n".join([torch(), *(lowest() if sys.argv[1] == "lowest" else newest())]))
