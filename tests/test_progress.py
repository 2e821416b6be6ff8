"""Bars are for terminals; everything else gets plain lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flatbench.orchestration import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("file", "lines"), [(io.StringIO(), True), (Terminal(), False)])
def test_a_bar_needs_a_terminal_and_not_only_colours(
    file: io.StringIO, lines: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as notebook kernels set it
    monkeypatch.setenv("TERM", "xterm")
    with progress.display(Console(file=file, width=80)) as display:
        display.stage("small: final", 6, 2)
        display.look(3, [progress.UnderWay("lora seed 0", 0.25, 12.0)])
    assert ("small: final: 6 runs, 2 finished already" in file.getvalue()) == lines
    assert ("\x1b[?25l" in file.getvalue()) != lines  # a bar hides the cursor
