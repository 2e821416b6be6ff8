"""What orchestration costs: planning, coordination and memory.

Planning writes every run directory and study.json of 10,000 runs, in the worker process in which
`flatbench run --jobs 2` plans; its start, with torch's import, is counted.

Coordination is the whole command `flatbench run --jobs 2` on a study of 64 runs of about 5 s, from its start
to its exit, beside a bare process pool of two workers that trains the same 64 models with the same trainer,
saves and evaluates them, and does nothing else: no claims, no states to resume from, no events, no records.
The two take turns. Both start their workers and import torch within the time.

Goals: at most 10 ms a run to plan, at most 3 % for coordination with the cores busy for 95 % of the time, at
most 300 MB in the coordinating process, without torch.

    python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import record
import yaml

from flatbench import events, plan, stages, store, study
from flatbench.executors.local import Local

WORKERS = 2
METHODS = ["lora", "sam", "flat_lora", "eflat_lora"]
PLANNED = {
    "name": "scale",
    "task": {"name": "digits", "train_size": 60, "validation_size": 50, "test_size": 100},
    "model": {"hidden_size": 16, "layers": 1, "heads": 2, "pretrain_epochs": 1},
    "methods": METHODS,
    "train": {"epochs": 1},
}
TRAINED = {
    "name": "scale",
    "task": {"name": "digits", "train_size": 1000, "validation_size": 200, "test_size": 400},
    "model": {"hidden_size": 128, "layers": 3, "heads": 4, "pretrain_epochs": 3},
    "methods": ["lora"],
    "train": {"epochs": 3, "batch_size": 16, "lr": 1e-3, "threads": 1},
    "measures": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planned", type=int, default=10_000, help="runs to plan")
    parser.add_argument("--runs", type=int, default=64, help="runs to train")
    parser.add_argument("--seconds", type=float, default=5.0, help="what one of them should take at least")
    parser.add_argument("--blocks", type=int, default=3, help="how often each side is run")
    arguments = parser.parse_args()
    found = {"planning": planning(arguments.planned)}
    found["coordination"] = coordination(arguments.runs, arguments.seconds, arguments.blocks)
    record.write("scale", found)


def planning(runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scale.yaml"
        seeds = runs // len(METHODS)
        file.write_text(yaml.safe_dump({**PLANNED, "seeds": list(range(seeds))}))
        seconds = []
        for _ in range(2):  # the first makes the directories, the second finds them made
            start = time.perf_counter()
            with Local(jobs=WORKERS) as executor:
                stage = stages.Apart(executor, str(file), [], Path(folder) / "results").stage(last=False)
            seconds.append(time.perf_counter() - start)
    count = len(stage.states)
    return {
        "runs": count,
        "ms_per_run": round(1000 * seconds[0] / count, 3),
        "again_ms_per_run": round(1000 * seconds[1] / count, 3),
    }


def coordination(runs: int, seconds: float, blocks: int) -> dict[str, Any]:
    content = {**TRAINED, "seeds": list(range(runs))}
    with tempfile.TemporaryDirectory() as folder:
        # the pretrained model of the digits is made and kept before anything is timed
        for attempt in range(2):  # evaluation does not grow with the epochs: the first misses a little
            some = _bare(content, Path(folder) / str(attempt), 3 * WORKERS)
            # a worker's first run imports what the others find imported: the median is theirs
            epochs = math.ceil(content["train"]["epochs"] * seconds / statistics.median(some["training"]))
            content["train"] = {**content["train"], "epochs": epochs}
    pools, studies = [], []
    for _ in range(blocks):
        with tempfile.TemporaryDirectory() as folder:
            pools.append(_bare(content, Path(folder), runs))
        with tempfile.TemporaryDirectory() as folder:
            studies.append(_study(content, Path(folder)))
    ratios = [study["seconds"] / pool["seconds"] for study, pool in zip(studies, pools, strict=True)]
    return {
        "runs": runs,
        "workers": WORKERS,
        "epochs": epochs,
        "seconds_per_run_in_the_pool": [round(statistics.median(pool["training"]), 2) for pool in pools],
        "seconds_pool": [round(pool["seconds"], 2) for pool in pools],
        "seconds_flatbench": [round(study["seconds"], 2) for study in studies],
        "overhead_percent": [round(100 * (ratio - 1), 2) for ratio in ratios],
        "cpu_busy_percent_pool": [pool["busy"] for pool in pools],
        "cpu_busy_percent_flatbench": [study["busy"] for study in studies],
        "workers_busy_percent": [study["occupied"] for study in studies],
        "coordinator_peak_mb": max(study["peak_mb"] for study in studies),
        "coordinator_has_torch": any(study["torch"] for study in studies),
    }


def _bare(content: dict[str, Any], folder: Path, runs: int) -> dict[str, Any]:
    """The pool's time, from before it starts its workers until they have ended."""
    loaded = study.Study({**content, "seeds": list(range(runs))}, "scale.yaml")
    results = store.StudyFolder(folder, "scale")
    paths = []
    for run in plan.Plan(loaded, results).final([]):
        directory = results.run(run.id)
        directory.prepare(run.spec())
        paths.append(directory.path)
    before, start = _children(), time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        training = list(pool.map(_train, paths))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "training": training, "busy": _percent(_children() - before, seconds)}


def _train(path: Path) -> float:
    """One run as a script would make it: train, save, evaluate."""
    import torch

    from flatbench import adapters, opening
    from flatbench.training import Trainer, fixed_batches

    start = time.perf_counter()
    torch.set_num_threads(1)
    run = opening.open_run(store.RunDirectory(path), trained=False)
    options, seed = run.train, run.config["seed"]
    trainer = Trainer(run.task, run.model, run.splits, options, run.config["optimizer"], seed)
    trainer.run()
    adapters.save(run.model, path / "adapter")
    device = opening.place(run.model)
    for examples in (run.splits.train, run.splits.validation, run.splits.test):
        run.task.evaluate(run.model, fixed_batches(run.task, examples, options.eval_batch_size, device))
    return time.perf_counter() - start


#: runs the command in this very process and tells afterwards how large it was and whether it held torch
_COMMAND = """
import json, pathlib, sys
from flatbench.cli import app
try:
    app(["run", "scale.yaml", "--jobs", sys.argv[1]], standalone_mode=False)
finally:
    # not getrusage: a process inherits the peak of the one that started it
    told = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    peak = int(told["VmHWM"].split()[0]) * 1024 / 1e6
    print(json.dumps({"peak_mb": peak, "torch": "torch" in sys.modules}), file=sys.stderr)
"""


def _study(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The command's time, from its start to its exit."""
    (folder / "scale.yaml").write_text(yaml.safe_dump(content))
    before, start = _children(), time.perf_counter()
    command = [sys.executable, "-c", _COMMAND, str(WORKERS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    told = json.loads(done.stderr.splitlines()[-1])
    results = store.StudyFolder(folder / "results", "scale")
    spans = [_span(directory.path) for directory in results.directories()]
    lasted = max(end for _, end in spans) - min(begin for begin, _ in spans)
    occupied = sum(end - begin for begin, end in spans)
    return {
        "seconds": seconds,
        "busy": _percent(_children() - before, seconds),
        "occupied": _percent(occupied, lasted),
        "peak_mb": round(told["peak_mb"], 1),
        "torch": told["torch"],
    }


def _span(path: Path) -> tuple[float, float]:
    """When a run began and when it was done, in seconds since 1970."""
    times = {e["event"]: datetime.fromisoformat(e["time"]).timestamp() for e in events.read(path)}
    return times["begun"], times["done"]


def _children() -> float:
    """CPU seconds of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _percent(cpu_seconds: float, seconds: float) -> float:
    return round(100 * cpu_seconds / (WORKERS * seconds), 1)


if __name__ == "__main__":
    main()
