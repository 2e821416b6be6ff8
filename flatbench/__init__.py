"""flatbench: which way of LoRA fine-tuning finds flatter minima, does it generalize, what does it cost?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatbench.config.lazy import lazy_names
from flatbench.version import __version__

if TYPE_CHECKING:
    from flatbench.notebook.checkpoint import Checkpoint
    from flatbench.notebook.load import load_checkpoint
    from flatbench.notebook.results import load_results
    from flatbench.orchestration.api import UnfinishedWarning, list_studies, run

__all__ = [
    "Checkpoint",
    "UnfinishedWarning",
    "__version__",
    "landscape",
    "list_studies",
    "load_checkpoint",
    "load_results",
    "report",
    "run",
]

# `import flatbench` and `flatbench --help` load no torch
__getattr__ = lazy_names(
    __name__,
    {
        "Checkpoint": "flatbench.notebook.checkpoint:Checkpoint",
        "load_checkpoint": "flatbench.notebook.load:load_checkpoint",
        "load_results": "flatbench.notebook.results:load_results",
        "landscape": "flatbench.landscape",
        "report": "flatbench.report",
        **{
            name: f"flatbench.orchestration.api:{name}"
            for name in ("UnfinishedWarning", "list_studies", "run")
        },
    },
)
