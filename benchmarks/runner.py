"""What the runner costs on top of a bare accelerate loop, on the quickstart's model and data.

The bare loop is what accelerate's own tutorial shows: prepare, forward, backward, step, scheduler. Ours adds
the history, the shuffled batches that resume exactly, the closure, and a resumable state on disk after
every epoch. Both train LoRA with AdamW for the same epochs of the same data; the goal is an overhead of at
most 3 %.

    python benchmarks/runner.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import record
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_scheduler

from flatbench import tasks
from flatbench.config.sections import AdapterOptions, TrainOptions
from flatbench.models.adapt import adapt
from flatbench.store import training_state
from flatbench.tasks.base import Splits, Task
from flatbench.training.trainer import Trainer

ADAPTER = AdapterOptions(r=4, alpha=8)


def adapted_model(task: Task) -> torch.nn.Module:
    torch.manual_seed(0)
    return adapt(task.build_model(0), ADAPTER, task.target_modules, task.modules_to_save)


def bare(task: Task, splits: Splits, train: TrainOptions) -> float:
    """Seconds of the plain accelerate loop."""
    accelerator = Accelerator()
    model = adapted_model(task)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=0.0)
    loader = DataLoader(splits.train, batch_size=train.batch_size, shuffle=True, collate_fn=task.collate)
    scheduler = get_scheduler("linear", optimizer, 0, len(loader) * train.epochs)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    start = time.perf_counter()
    model.train()
    for _ in range(train.epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
    return time.perf_counter() - start


def ours(task: Task, splits: Splits, train: TrainOptions, folder: Path) -> float:
    """Seconds of the runner's loop, with its state written after every epoch."""
    plain = {"name": "plain", "base": {}}
    trainer = Trainer(task, adapted_model(task), splits, train, plain, seed=0)
    start = time.perf_counter()
    trainer.run(lambda trainer: training_state.save(folder / "state.safetensors", trainer.state_dict()))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = tasks.load({"name": "digits"}, {})
    splits = task.splits(0)
    train = TrainOptions(epochs=arguments.epochs, batch_size=32, lr=1e-2, log_every=1)
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "bare": lambda: bare(task, splits, train),
            "ours": lambda: ours(task, splits, train, Path(folder)),
        }
        seconds = record.interleaved(variants, arguments.blocks)
    found = record.ratio(seconds["ours"], seconds["bare"])
    steps = len(splits.train) / train.batch_size * train.epochs
    record.write(
        "runner",
        {
            "overhead": round(found["median"] - 1, 4),
            "overhead_quartiles": [round(found["quartile_1"] - 1, 4), round(found["quartile_3"] - 1, 4)],
            "bare_ms_per_step": round(1000 * sorted(seconds["bare"])[len(seconds["bare"]) // 2] / steps, 3),
            "blocks": arguments.blocks,
        },
    )


if __name__ == "__main__":
    main()
