"""Display in a notebook: measured values as tables, and a bar while a computation runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flatbench.report.html import html_table
from flatbench.report.resolution import unresolved

if TYPE_CHECKING:
    import pandas as pd


class Measured(Mapping[str, Any]):
    """What a measure found, by name; shown as a table in a notebook.

    Attributes:
        name: the measure.
        cached: whether it was measured before, of the same weights and data with the same options.
    """

    def __init__(self, name: str, values: Mapping[str, Any], cached: bool) -> None:
        self.name, self.cached, self._values = name, cached, dict(values)

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def to_frame(self) -> pd.DataFrame:
        """A row a value: ``name``, ``value``."""
        import pandas as pd

        return pd.DataFrame({"name": list(self._values), "value": list(self._values.values())})

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self._texts().items())})"

    def _texts(self) -> dict[str, str]:
        return {key: short(value) for key, value in self._values.items()} | unresolved(self._values)

    def _repr_html_(self) -> str:
        note = " (from the cache)" if self.cached else ""
        return html_table(self._texts(), f"{self.name}{note}")


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, and has not only loaded what kernels are made of."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class Bar:
    """A tqdm bar where somebody looks; it knows notebooks."""

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = (in_notebook() or sys.stderr.isatty()) if wanted is None else wanted
        self.bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, done: int, total: int) -> None:
        """So many are done."""
        if not self.wanted:
            return
        if self.bar is None:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, desc="landscape", unit="point", leave=False)
        self.bar.update(done - self.bar.n)


def short(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "…"
