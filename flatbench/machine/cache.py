"""Folder for results that can be recomputed: backbones, finished measurements, landscapes."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """$FLATBENCH_CACHE, or ~/.cache/flatbench."""
    return Path(os.environ.get("FLATBENCH_CACHE") or Path.home() / ".cache" / "flatbench")
