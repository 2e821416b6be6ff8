"""Lets the tests of this folder use the measures' tiny subjects and quadratics."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "measures"))
