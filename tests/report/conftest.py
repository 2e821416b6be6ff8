"""Figures of reports are sketched in these tests, unless a test is about how they are drawn (`drawn`)."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text
from PIL import Image

from flatbench.report.figures import style

_PIXEL = io.BytesIO()
Image.new("RGB", (1, 1)).save(_PIXEL, "PNG")


def sketch(figure: Any, folder: Path, name: str) -> list[str]:
    """Write the files of `style.save` undrawn: what the figure holds as text, a picture of one pixel."""
    held = [text.get_text() for text in figure.findobj(Text)]
    held += [repr(line.get_xydata().tolist()) for axis in figure.axes for line in axis.lines]
    held += [repr(c.get_offsets().tolist()) for axis in figure.axes for c in axis.collections]
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{name}.{ending}" for ending in style.FORMATS]
    for file in names:
        content = _PIXEL.getvalue() if file.endswith("png") else "\n".join(held).encode()
        if file.endswith("svg"):
            content = f"<svg xmlns='http://www.w3.org/2000/svg'><desc>{escape(content.decode())}</desc></svg>".encode()
        (folder / file).write_bytes(content)
    return names


@pytest.fixture(autouse=True)
def _sketched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a figure in three formats takes a second, and a report has a dozen."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr(style, "save", sketch)
