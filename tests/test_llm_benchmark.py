"""The benchmark of large models runs its code on a tiny one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "llm.py"


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory peaks")
def test_small_measures_products_beside_a_gradient(tmp_path: Path) -> None:
    engines = ["gradient", "lean"]
    command = [sys.executable, str(BENCHMARK), "--small", "--tokens", "48", "--products", "1"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path), "--remark", "a test", "--engines", *engines],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    found = json.loads((tmp_path / "llm.json").read_text(encoding="utf-8"))
    assert found["remark"] == "a test"
    entry = found["small_adapter_48"]
    assert entry["lean"]["way"] == "blocks", done.stdout
    assert entry["lean"]["head"] == "in chunks of tokens"
    assert entry["ratios"]["lean"]["memory_of_a_gradient"] > 0
