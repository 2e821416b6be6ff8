"""flatbench: which way of LoRA fine-tuning finds flatter minima, does it generalize, what does it cost?"""

from __future__ import annotations

__version__ = "0.1.0"
