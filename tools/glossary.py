"""Write docs/glossary.md from its source in the code.

python tools/glossary.py
"""

from __future__ import annotations

from pathlib import Path

from flatbench.report.text import glossary

if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "glossary.md").write_text(glossary.document(), encoding="utf-8")
