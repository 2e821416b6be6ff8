"""How well `flatbench show` predicts the wall time of small twins of the papers' studies.

    python benchmarks/planning.py DATA

DATA is a folder with E2E's and Fashion-MNIST's published files in `e2e` and `fashion_mnist`. Each twin is
predicted, then run, with two methods, in one process, so that what the prediction says and what the clock
says are of the same machine at about the same load, which is recorded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
from rich.console import Console

from flatbench import store, study
from flatbench.estimate import wall_time
from flatbench.executors.local import Local
from flatbench.orchestration import progress, run_study

ROOT = Path(__file__).parents[1]
#: twin -> folder of its data, and model
TWINS = {
    "paper-e2e-small": ("e2e", "gpt2"),
    "paper-clip-small": ("fashion_mnist", "clip"),
    "fashion-mnist-small": ("fashion_mnist", "vit"),
}
METHODS = "methods=[lora, {name: eflat_lora, grid: {lr: [1e-2], rho: [0.05, 0.2]}}]"


def settings(data: Path, model: Path, name: str) -> list[str]:
    """What is set beside the study's own values."""
    folder, _ = TWINS[name]
    found = [f"variables.data={data / folder}", f"variables.model={model}", METHODS]
    return [*found, 'grid={"task.shots, train.epochs": [[4, 100]]}'] if name == "paper-clip-small" else found


def measured(name: str, overrides: list[str], folder: Path) -> float:
    """Seconds that the study takes from the first run's begin to the last one's end, in one process."""
    loaded = study.load(name, overrides)
    began = time.perf_counter()
    with Local(jobs=1) as executor, progress.display(Console(file=sys.stderr)) as display:
        run_study.run(loaded, store.StudyFolder(folder, loaded.name), executor, display)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data.resolve()
    twins = {}
    with tempfile.TemporaryDirectory() as made:
        for name, (_, kind) in TWINS.items():
            model = Path(made) / kind
            script = [sys.executable, str(ROOT / "studies" / "small_models.py"), kind, str(model)]
            subprocess.run(script, check=True)
            overrides = settings(data, model, name)
            load = os.getloadavg()[0]
            loaded = study.load(name, overrides)
            predicted = wall_time.wall_time(loaded, store.StudyFolder(Path(made) / "none", loaded.name))
            taken = measured(name, overrides, Path(made) / "results")
            twins[name] = {
                "predicted_seconds": predicted.total,
                "measured_seconds": taken,
                "ratio": predicted.total / taken,
                "basis": sorted({one.basis for one in predicted.times}),
                "load_before": load,
                "load_after": os.getloadavg()[0],
            }
            print(name, twins[name], flush=True)
            record.write("planning", {"twins": twins})


if __name__ == "__main__":
    main()
