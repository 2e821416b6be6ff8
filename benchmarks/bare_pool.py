"""The bare process pool that `scale.py` measures against: trains runs, and does nothing else.

    python benchmarks/bare_pool.py WORKERS RUN_DIRECTORY...

Prints the CPU seconds of each. There are no claims, no states to resume from, no events and no records.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor


def main() -> None:
    workers, *paths = sys.argv[1:]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(int(workers), mp_context=context) as pool:
        seconds = list(pool.map(_train, paths))
    print(json.dumps(seconds))


def _train(path: str) -> float:
    """One run as a script would make it: train, save, evaluate."""
    from pathlib import Path

    import torch

    from flatbench.models import weights
    from flatbench.runs import open as opening
    from flatbench.store import RunDirectory
    from flatbench.training.trainer import Trainer, fixed_batches

    start = time.process_time()
    torch.set_num_threads(1)
    run = opening.open_run(RunDirectory(Path(path)), trained=False)
    options, seed = run.train, run.config["seed"]
    trainer = Trainer(run.task, run.model, run.splits, options, run.config["optimizer"], seed)
    trainer.run()
    weights.save(run.model, Path(path) / "adapter")
    device = opening.place(run.model)
    for examples in (run.splits.train, run.splits.validation, run.splits.test):
        run.task.evaluate(run.model, fixed_batches(run.task, examples, options.eval_batch_size, device))
    return time.process_time() - start


if __name__ == "__main__":
    main()
