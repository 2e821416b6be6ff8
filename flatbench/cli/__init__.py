"""The command line: commands, and what they list."""

from __future__ import annotations

from flatbench.cli.commands import app, main

__all__ = ["app", "main"]
