"""CLIP tasks and image files in CoOp's layout that their tests write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.images.clip_classification import ClipClassification
from flatbench.tasks.images.clip_data import DATA

COLOURS = {"dark_red": (120, 10, 10), "sea green": (20, 150, 90), "blue": (10, 10, 220)}


def make(model: PretrainedModel, data: Path, **options: Any) -> ClipClassification:
    return ClipClassification(model=model, data=str(data), **{"shots": 8, **options})


def write_split(
    folder: Path, dataset: str = "eurosat", counts: tuple[int, int, int] = (6, 5, 4), **changes: Any
) -> Path:
    """A data set in CoOp's layout, a class a colour; ``changes`` replace whole parts of the split file."""
    published = DATA[dataset]
    content: dict[str, Any] = {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        rows = []
        for label, (name, colour) in enumerate(COLOURS.items()):
            for i in range(count):
                relative = f"{name}/{part}_{i}.png"
                path = folder / published.images / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 18), tuple(min(255, c + i) for c in colour)).save(path)
                rows.append([relative, label, name])
        content[part] = rows
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    (folder / published.split).write_text(json.dumps(content))
    return folder


def files(task: ClipClassification) -> dict[str, list[str]]:
    return {name: [str(p.paths[i]) for i in indices] for name, (p, indices) in task._draw.parts.items()}
