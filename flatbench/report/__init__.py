"""Statistics, tables and figures from the results table; imports no torch."""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "Comparison": "compare",
    "Results": "analysis.results",
    "open_results": "analysis.archive",
    "load_publications": "tables.published",
    "write_report": "document",
    "terminal_table": "tables.averages",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
