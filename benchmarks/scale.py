"""What orchestration costs: planning, coordination, looking at thousands of runs, and memory.

Planning writes every run directory and study.json of 10,000 runs, in the worker process in which
`flatbench run --jobs 2` plans; its start, with torch's import, is counted.

Coordination is the whole command `flatbench run --jobs 2` on a study of 64 runs of at least 5 s, from its
start to its exit, beside a bare process pool of two workers that trains the same 64 models with the same
trainer, saves and evaluates them, and does nothing else (`bare_pool.py`). Both start their workers and import
torch within the time. The two take turns of a few seconds, in which the other one is stopped, since the
machine's own speed drifts by more than what is looked for (`turns.py`).

Looking is the whole command `flatbench show` on a study of 20,000 finished runs, and `flatbench status` on
one of 10,000, from its start to its exit; its figures have a file of their own, `looking.json`. The runs have
the files that a run leaves, with checksums, and are not trained.

Goals: at most 5 s to show 20,000 runs, 3 s for the status of 10,000, 300 MB in each; at most 10 ms a run to
plan, at most 3 % for coordination with the workers busy for 95 % of the time, at most 300 MB in the
coordinating process, without torch.

    python benchmarks/scale.py
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import record
import turns
import yaml
from turns import Turns

from flatbench import store, study
from flatbench.executors.local import Local
from flatbench.orchestration import stages
from flatbench.store import checksums, events
from flatbench.study import plan

WORKERS = 2
#: seconds: long beside what a switch costs, short beside the machine's drift
TURN = 4.0
#: each worker has one thread
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
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
    parser.add_argument("--shown", type=int, default=20_000, help="runs to show")
    parser.add_argument("--surveyed", type=int, default=10_000, help="runs of which to tell the status")
    parser.add_argument("--looking-only", action="store_true", help="record looking.json alone")
    arguments = parser.parse_args()
    looked = {"show": looking("show", arguments.shown), "status": looking("status", arguments.surveyed)}
    record.write("looking", looked)
    if arguments.looking_only:
        return
    found: dict[str, Any] = {"planning": planning(arguments.planned)}
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


def looking(command: str, runs: int, times: int = 3) -> dict[str, Any]:
    """A command on a study of so many finished runs; the median of its wall times, and its largest peak."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scale.yaml"
        seeds = list(range(runs // len(METHODS)))
        file.write_text(yaml.safe_dump({**PLANNED, "seeds": seeds, "measures": ["cost"]}))
        planned = plan.Plan(study.load(str(file)), store.StudyFolder(Path(folder) / "results", "scale"))
        made = planned.final([])
        for run in made:
            finished(planned.folder.run(run.id), run.spec())
        planned.folder.write(planned.snapshot())
        told = []
        for _ in range(times):
            began = time.perf_counter()
            asked = [sys.executable, "-c", _COMMAND, command, "scale.yaml" if command == "show" else "scale"]
            output = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - began
            told.append({**json.loads(output.stderr.splitlines()[-1]), "seconds": seconds})
            if f"{len(made)} done" not in output.stdout and str(len(seeds)) not in output.stdout:
                raise RuntimeError(output.stdout)
    return {
        "runs": len(made),
        "seconds": round(statistics.median(one["seconds"] for one in told), 2),
        "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in told), 2),
        "peak_mb": round(max(one["peak_mb"] for one in told), 1),
        "torch": any(one["torch"] for one in told),
        "lines": len(output.stdout.splitlines()),
    }


def finished(run: store.RunDirectory, spec: dict[str, Any]) -> None:
    """The files of a run that is done, written at once."""
    metrics = {split: {"loss": 0.5, "accuracy": 0.5} for split in ("train", "validation", "test")}
    times = [f"2026-01-01T00:00:{second:02}.000+00:00" for second in (0, 5, 10)]
    happened = [{"time": t, "event": e} for t, e in zip(times, ("begun", "trained", "done"), strict=True)]
    files = {
        "run.json": json.dumps(spec),
        "environment.json": json.dumps({"device": "cpu", "threads": 1}),
        "result.json": json.dumps({"metrics": metrics, "training": {}}),
        "history.parquet": "x" * 3000,
        "adapter/adapter_model.safetensors": "x" * 3000,
        "adapter/adapter_config.json": "{}",
        "measures/cost.json": json.dumps({"config": {"name": "cost"}, "values": {"step_ms": 3.0}}),
        "events.jsonl": "".join(json.dumps(event) + "\n" for event in happened),
    }
    for folder in ("adapter", "measures"):
        (run.path / folder).mkdir(parents=True)
    for name, content in files.items():
        (run.path / name).write_text(content)
    sums = {name: checksums.of_file(run.path / name) for name in checksums.files_of(run.path)}
    (run.path / "done.json").write_text(json.dumps({"measures": ["cost"], "files": sums}, indent=1))


def coordination(runs: int, seconds: float, blocks: int) -> dict[str, Any]:
    content = {**TRAINED, "seeds": list(range(runs))}
    # the pretrained model of the digits is made and kept before anything is timed
    for _ in range(2):  # evaluation does not grow with the epochs: the first misses a little
        with tempfile.TemporaryDirectory() as folder:
            some = _pool(content, Path(folder), 3 * WORKERS)
            some.turn(None)
            # a worker's first run imports what the others find imported: the median is theirs
            median = statistics.median(_trained(some))
        epochs = math.ceil(content["train"]["epochs"] * seconds / median)
        content["train"] = {**content["train"], "epochs": epochs}
    found = [_pair(content, runs, pool_first=block % 2 == 0) for block in range(blocks)]
    ratios = [study["seconds"] / pool["seconds"] for pool, study in found]
    pools, studies = [pool for pool, _ in found], [study for _, study in found]
    return {
        "runs": runs,
        "workers": WORKERS,
        "epochs": epochs,
        "seconds_of_a_turn": TURN,
        "cpu_seconds_per_run_in_the_pool": [pool["cpu_seconds_per_run"] for pool in pools],
        "seconds_pool": [round(pool["seconds"], 2) for pool in pools],
        "seconds_flatbench": [round(study["seconds"], 2) for study in studies],
        "overhead_percent": [round(100 * (ratio - 1), 2) for ratio in ratios],
        "overhead_percent_of_all": round(
            100 * (sum(s["seconds"] for s in studies) / sum(p["seconds"] for p in pools) - 1), 2
        ),
        "cpu_busy_percent_pool": [pool["busy"] for pool in pools],
        "workers_busy_percent": [study["occupied"] for study in studies],
        "coordinator_peak_mb": max(study["peak_mb"] for study in studies),
        "coordinator_has_torch": any(study["torch"] for study in studies),
    }


def _pair(content: dict[str, Any], runs: int, pool_first: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both sides took, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        pool, study = _pool(content, Path(folder) / "pool", runs), _study(content, Path(folder) / "study")
        turns.alternate([pool, study] if pool_first else [study, pool], TURN)
        told = json.loads(study.output.read_text().splitlines()[-1])
        results = store.StudyFolder(study.folder / "results", "scale")
        spans = [_span(directory.path) for directory in results.directories()]
        trained = _trained(pool)
    lasted = max(end for _, end in spans) - min(begin for begin, _ in spans)
    occupied = sum(end - begin for begin, end in spans)
    return {
        "seconds": pool.seconds,
        "busy": _percent(pool.cpu_seconds, pool.seconds),
        "cpu_seconds_per_run": round(statistics.median(trained), 2),
    }, {
        "seconds": study.seconds,
        # its workers are forks of a server that nobody waits for, so that their CPU time is not known
        "occupied": _percent(occupied, lasted),
        "peak_mb": round(told["peak_mb"], 1),
        "torch": told["torch"],
    }


def _pool(content: dict[str, Any], folder: Path, runs: int) -> Turns:
    """The bare pool, its run directories made."""
    loaded = study.Study({**content, "seeds": list(range(runs))}, "scale.yaml")
    results = store.StudyFolder(folder, "scale")
    paths = []
    for run in plan.Plan(loaded, results).final([]):
        directory = results.run(run.id)
        directory.prepare(run.spec())
        paths.append(str(directory.path))
    script = Path(__file__).with_name("bare_pool.py")
    return Turns([sys.executable, str(script), str(WORKERS), *paths], folder, ENVIRONMENT)


def _trained(pool: Turns) -> list[float]:
    """CPU seconds of each run of a pool."""
    return json.loads(pool.output.read_text().splitlines()[-1])


#: runs the command in this very process and tells afterwards how large it was and whether it held torch
_COMMAND = """
import json, pathlib, sys, time
from flatbench.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    # not getrusage: a process inherits the peak of the one that started it
    told = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    peak = int(told["VmHWM"].split()[0]) * 1024 / 1e6
    found = {"peak_mb": peak, "torch": "torch" in sys.modules, "cpu_seconds": time.process_time()}
    print(json.dumps(found), file=sys.stderr)
"""


def _study(content: dict[str, Any], folder: Path) -> Turns:
    folder.mkdir()
    (folder / "scale.yaml").write_text(yaml.safe_dump(content))
    asked = [sys.executable, "-c", _COMMAND, "run", "scale.yaml", "--jobs", str(WORKERS)]
    return Turns(asked, folder, ENVIRONMENT)


def _span(path: Path) -> tuple[float, float]:
    """When a run began and when it was done, in seconds since 1970."""
    times = {e["event"]: datetime.fromisoformat(e["time"]).timestamp() for e in events.read(path)}
    return times["begun"], times["done"]


def _percent(cpu_seconds: float, seconds: float) -> float:
    return round(100 * cpu_seconds / (WORKERS * seconds), 1)


if __name__ == "__main__":
    main()
