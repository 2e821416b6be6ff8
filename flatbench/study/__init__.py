"""From a study file to its runs: schema, methods, grids, plan."""

from __future__ import annotations

from flatbench.study.load import load
from flatbench.study.study import Condition, Study, resolve_measure

__all__ = ["Condition", "Study", "load", "resolve_measure"]
