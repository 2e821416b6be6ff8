"""Statistics, tables and figures from the results table; imports no torch."""

from __future__ import annotations

from flatbench.config.lazy import lazy_names

_PLACES = {
    "Comparison": "flatbench.report.compare:Comparison",
    "Results": "flatbench.report.analysis.results:Results",
    "open_results": "flatbench.report.analysis.archive:open_results",
    "load_publications": "flatbench.report.tables.published:load_publications",
    "write_report": "flatbench.report.document:write_report",
    "terminal_table": "flatbench.report.tables.averages:terminal_table",
}

__all__ = [*_PLACES]
__getattr__ = lazy_names(__name__, _PLACES)
