"""The command line: commands, listings and status."""

from __future__ import annotations

from flatbench.cli.commands import app, main

__all__ = ["app", "main"]
