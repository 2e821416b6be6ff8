"""Names and values as a small table of HTML, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping


def html_table(entries: Mapping[str, str], title: str = "") -> str:
    """Names and texts, a row each, under a title if there is one; all of them are escaped."""
    left = "style='text-align:left'"
    caption = f"<caption {left}>{html.escape(title)}</caption>" if title else ""
    rows = "".join(
        f"<tr><th {left}>{html.escape(str(name))}</th><td {left}>{html.escape(text)}</td></tr>"
        for name, text in entries.items()
    )
    return f"<table>{caption}{rows}</table>"
