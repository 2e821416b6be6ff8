"""flatbench: which way of LoRA fine-tuning finds flatter minima, does it generalize, what does it cost?"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flatbench.version import __version__

if TYPE_CHECKING:
    from flatbench.notebook.checkpoint import Checkpoint, load_checkpoint
    from flatbench.notebook.results import load_results

__all__ = ["Checkpoint", "__version__", "landscape", "load_checkpoint", "load_results"]

# loaded when they are used: `import flatbench` and `flatbench --help` load no torch
_HOMES = {
    "Checkpoint": "flatbench.notebook.checkpoint",
    "load_checkpoint": "flatbench.notebook.checkpoint",
    "load_results": "flatbench.notebook.results",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "landscape":
        return importlib.import_module("flatbench.landscape")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
