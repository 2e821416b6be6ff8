"""The benchmarks of large models run their code on tiny ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, tmp_path: Path, *options: str) -> Any:
    """What a benchmark writes."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--small", "--results", str(tmp_path), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / script).with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory peaks")
def test_small_measures_products_beside_a_gradient(tmp_path: Path) -> None:
    options = ["--tokens", "48", "--products", "1", "--remark", "a test", "--engines", "gradient", "lean"]
    found = run("llm.py", tmp_path, *options)
    assert found["remark"] == "a test"
    entry = found["small_adapter_48"]
    assert entry["lean"]["way"] == "blocks"
    assert entry["lean"]["head"] == "in chunks of tokens"
    assert entry["ratios"]["lean"]["memory_of_a_gradient"] > 0


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's memory peaks")
def test_eigenvalues_of_a_small_one_are_certified(tmp_path: Path) -> None:
    found = run("llm_eigenvalues.py", tmp_path, "--tokens", "48", "--memory", "1GB")["small_merged_48"]
    assert all(found["certified"])
    assert len(found["values"]) == 5
    assert found["peak_bytes_in_all"] > found["bytes_with_the_model"] > found["bytes_before_the_model"]
