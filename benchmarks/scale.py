"""What orchestration costs: planning 10,000 runs, and the memory of the process that coordinates them.

Planning writes every run directory and study.json, in the process of its own in which
`flatbench run --jobs 2` plans; its start, with torch's import, is counted. Goals: at
most 10 ms a run, at most 300 MB without torch.

    python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import record
import yaml

from flatbench import stages

STUDY = {
    "name": "scale",
    "task": {"name": "digits", "train_size": 60, "validation_size": 50, "test_size": 100},
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "pretrain_epochs": 1},
    "methods": ["lora", "sam", "flat_lora", "eflat_lora"],
    "train": {"epochs": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scale.yaml"
        seeds = arguments.runs // len(STUDY["methods"])
        file.write_text(yaml.safe_dump({**STUDY, "seeds": list(range(seeds))}))
        planner = stages.Apart(str(file), [], Path(folder) / "results")
        seconds = []
        for _ in range(2):  # the first makes the directories, the second finds them made
            start = time.perf_counter()
            stage = planner.stage(last=False)
            seconds.append(time.perf_counter() - start)
        torch_loaded = "torch" in sys.modules
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    count = len(stage.states)
    record.write(
        "scale",
        {
            "runs": count,
            "plan_ms_per_run": round(1000 * seconds[0] / count, 3),
            "plan_again_ms_per_run": round(1000 * seconds[1] / count, 3),
            "coordinator_peak_mb": round(memory, 1),
            "coordinator_has_torch": torch_loaded,
        },
    )


if __name__ == "__main__":
    main()
