"""From a study file to its runs: schema, methods, grids, plan."""

from __future__ import annotations

from flatbench.study.study import Condition, Study, load, resolve_measure

__all__ = ["Condition", "Study", "load", "resolve_measure"]
