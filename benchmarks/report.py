"""How long the table and the report of a study with 10,000 stored runs take, and its memory.

The runs are written straight to disk as the runner would leave them (configuration, environment, history,
result, four measures, marker with checksums); nothing is trained. Goals: the table in at most 2 s, the report
in at most 20 s and 300 MB, no torch imported. The table's first reading, which fills its cache, is timed as
well. The command's seconds and peak, the largest resident memory of it or one of its processes, are those of
`flatbench report --html`, from its start to its end.

    python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd

from flatbench import report, store
from flatbench.store import checksums

METHODS = ["full_ft", "lora", "sam", "flat_lora", "eflat_lora"]
CONDITIONS = [f"task.label_noise={noise}" for noise in (0.0, 0.2, 0.4, 0.6)]
LRS = [1e-4 * 2**k for k in range(10)]
RHOS = [0.01 * 2**k for k in range(5)]
MEASURES = ["hessian_merged", "sam_sharpness_merged", "slice_merged", "cost"]
ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13"},
    "git_commit": None,
    "system": "Linux",
    "processor": "made up",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
}


def write_run(
    folder: store.StudyFolder,
    history: Path,
    condition: str,
    method: str,
    hyper: dict[str, float],
    seed: int,
) -> dict[str, Any]:
    """One finished run with made-up numbers; returns its id."""
    config = {
        "task": {"name": "digits", "condition": condition},
        "adapter": {"name": "none" if method == "full_ft" else "lora"},
        "optimizer": {"name": "plain" if method in ("lora", "full_ft") else method, "rho": hyper["rho"]},
        "train": {"lr": hyper["lr"], "method": method},
        "seed": seed,
        "stage": "final",
    }
    run = folder.run(store.run_id(config, "data"))
    rng = random.Random(run.id)
    sharpness = rng.lognormvariate(0, 1)
    files: dict[str, Any] = {
        "run": {
            "study": "benchmark",
            "condition": condition,
            "method": method,
            "metric": "accuracy",
            "hyper": hyper,
            "config": config,
            "data": "data",
            "measures": {label: {"name": label} for label in MEASURES},
        },
        "environment": ENVIRONMENT,
        "result": {
            "metrics": {
                split: {"loss": rng.random(), "accuracy": 0.7 + 0.1 * rng.random() - 0.01 * sharpness}
                for split in ("train", "validation", "test")
            },
            "training": {},
        },
        "measures/hessian_merged": values(rng, sharpness, "eigenvalue_1", "relative_error_bound_1"),
        "measures/sam_sharpness_merged": values(rng, sharpness, "sharpness", "one_step"),
        "measures/slice_merged": {
            "config": {},
            "values": {
                "mean_rise": sharpness,
                "positions": [k / 10 - 1 for k in range(21)],
                "losses": [[rng.random() for _ in range(21)] for _ in range(3)],
            },
        },
        "measures/cost": values(rng, 2.0, "step_ms", "train_seconds", "peak_memory_mb"),
    }
    (run.path / "measures").mkdir(parents=True)
    for name, content in files.items():
        (run.path / f"{name}.json").write_text(json.dumps(content))
    (run.path / "history.parquet").hardlink_to(history)
    sums = {name: checksums.of_file(run.path / name) for name in checksums.files_of(run.path)}
    (run.path / "done.json").write_text(json.dumps({"measures": MEASURES, "files": sums}))
    return {"id": run.id, "stage": "final", "condition": condition, "method": method, "hyper": hyper}


def values(rng: random.Random, scale: float, *names: str) -> dict[str, Any]:
    """A stored measure with numbers around ``scale``."""
    constants = {"space": "merged", "rho": 0.05, "converged": True, "examples": 400}
    return {"config": {}, "values": {**{name: scale * (1 + rng.random()) for name in names}, **constants}}


def write_study(root: Path, seeds: int) -> store.StudyFolder:
    """4 conditions × 5 methods × 10 learning rates × 5 radii × seeds, every one a final run."""
    folder = store.StudyFolder(root, "benchmark")
    history = root / "history.parquet"
    rows = [{"step": s, "epoch": 1 + s // 13, "loss": 1 / (1 + s), "lr": 1e-3} for s in range(390)]
    pd.DataFrame(rows).to_parquet(history)
    runs = []
    for condition, method, lr, rho, seed in itertools.product(CONDITIONS, METHODS, LRS, RHOS, range(seeds)):
        runs.append(write_run(folder, history, condition, method, {"lr": lr, "rho": rho}, seed))
    folder.write(
        {
            "study": {"name": "benchmark", "description": "", "tune": None},
            "methods": METHODS,
            "conditions": CONDITIONS,
            "seeds": list(range(seeds)),
            "budget": {m: {"trials": len(LRS) * len(RHOS), "tuning_seeds": [], "grid": {}} for m in METHODS},
            "selection": [],
            "measures": {label: {"name": label} for label in MEASURES},
            "runs": runs,
        }
    )
    return folder


def command(root: Path) -> dict[str, float]:
    """Seconds and peak of `flatbench report`, in a process of its own."""
    given = ["report", "benchmark", "--results", root, "--output", root / "reports", "--html"]
    start = time.perf_counter()
    process = subprocess.Popen(
        [Path(sys.executable).with_name("flatbench"), *map(str, given)], stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return {
        "command_seconds": round(time.perf_counter() - start, 2),
        "command_peak_mb": round(used.ru_maxrss / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="1,000 runs each")
    parser.add_argument("--html", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}

    def timed(name: str, work: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        result = work()
        found[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
        found[f"{name}_cpu_seconds"] = round(time.process_time() - cpu, 2)
        return result

    root = Path(tempfile.mkdtemp())
    try:
        folder = write_study(root, arguments.seeds)
        found["runs"] = len(folder.read()["runs"])
        time.sleep(3)  # what has just been written is not kept in the cache
        timed("table_first", lambda: store.table(folder))
        timed("table", lambda: store.table(folder))
        loaded = timed("load", lambda: report.Results.load(folder))
        timed("write", lambda: report.write_report(loaded, root / "out", html=arguments.html))
        found["report_seconds"] = round(found["load_seconds"] + found["write_seconds"], 2)
        found["torch_imported"] = "torch" in sys.modules
        found |= command(root)
        found["ratios"] = {
            "table_to_goal": round(found["table_seconds"] / 2, 3),
            "report_to_goal": round(found["command_seconds"] / 20, 3),
            "memory_to_goal": round(found["command_peak_mb"] / 300, 3),
        }
    finally:
        shutil.rmtree(root)
    # the machine's description imports torch, so it comes last
    import record

    record.write("report", found)


if __name__ == "__main__":
    main()
