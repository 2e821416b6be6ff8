"""GLUE tasks and files that their tests write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.text.glue import Glue
from tests.tasks.task_cases import write_tsv

PAIR = ["sentence1", "sentence2"]


def make(encoder: PretrainedModel, data: Path, task: Any = "rte", **options: Any) -> Glue:
    return Glue(model=encoder, data=str(data), task=task, **{"max_length": 32, **options})


def write_stsb(folder: Path) -> Path:
    header = ["index", "genre", "filename", "year", "old_index", "source1", "source2", *PAIR, "score"]
    rows = [
        [i, "main", "f", "2012", i, "none", "none", f"one {i}", f"two {i * i}", f"{(i % 11) / 2:.3f}"]
        for i in range(44)
    ]
    for name in ("train", "dev"):
        write_tsv(folder / "STS-B" / f"{name}.tsv", [header, *rows])
    return folder
