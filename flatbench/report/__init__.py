"""Statistics, tables and figures from the results table; imports no torch. Called, it writes a report."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from flatbench.config.lazy import lazy_names

if TYPE_CHECKING:
    from flatbench.report.analysis.results import Results
    from flatbench.report.document import Report

_PLACES = {
    "Comparison": "flatbench.report.compare:Comparison",
    "Results": "flatbench.report.analysis.results:Results",
    "open_results": "flatbench.report.analysis.archive:open_results",
    "load_publications": "flatbench.report.tables.published:load_publications",
    "write_report": "flatbench.report.document:write_report",
    "destination": "flatbench.report.placing:destination",
    "in_short": "flatbench.report.terminal:in_short",
}

__all__ = [*_PLACES]
__getattr__ = lazy_names(__name__, _PLACES)


class _Package(ModuleType):
    """This package, which is the function that it exists for as well."""

    def __call__(
        self,
        results: Results | str | Path,
        output: str | Path | None = None,
        *,
        folder: str | Path = "results",
        html: bool = False,
        published: bool = False,
    ) -> Report:
        """Write a study's tables and figures, as ``flatbench report`` does.

        Args:
            results: what `flatbench.run` gave; a study by its name or file, whose results are in
                ``folder``; or the ``results.parquet`` of an earlier report.
            output: where the report goes, in a folder with the study's name: ``reports``, or
                ``local/reports`` where that would write over a report that is committed.
            folder: where results are.
            html: also one self-contained page.
            published: show published figures for these tasks beside it.

        Returns:
            The files that were written, and notes on the results.

        Raises:
            InputError: no results of this study there.
            StorageError: the report cannot be written.
        """
        from flatbench.report.analysis.archive import open_results
        from flatbench.report.analysis.results import Results
        from flatbench.report.document import write_report
        from flatbench.report.placing import destination
        from flatbench.report.tables.published import load_publications

        found = results if isinstance(results, Results) else open_results(str(results), Path(folder))
        publications = load_publications(()) if published else ()
        place, _ = destination(output, found.name)
        return write_report(found, place, html=html, publications=publications)


# `flatbench.report` is a package, and the natural name of its main function
sys.modules[__name__].__class__ = _Package
