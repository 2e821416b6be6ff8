"""The hub, simulated: tiny repositories in the exact layouts of those that studies name.

Only the download is replaced. Data sets are read by `datasets` from a folder that holds what the repository
holds at a revision; models are found in a cache as the hub's client leaves it after a download.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Features, Value
from datasets import Sequence as Listed
from PIL import Image

from flatbench.config import sources
from flatbench.runs import open as opening
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.text import glue_data, prompt_data
from flatbench.tasks.vqa import data as vqa_data
from tests.tasks.task_cases import sentence

COMMIT = "0" * 40
#: rows of a split of a tiny repository, unless more are needed for every class to be there
ROWS = 24


class Hub:
    """Repositories by name and revision; made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[tuple[str, Any, Any, Any]]()
        self._load = datasets.load_dataset
        #: (name, revision) -> what load_dataset raises instead
        self.fails: dict[tuple[str, str | None], Exception] = {}
        #: (name, revision) -> folder instead of the usual one
        self.moved: dict[tuple[str, str | None], Path] = {}

    def load_dataset(
        self, name: str, configuration: str | None = None, *, revision: str | None = None, **options: Any
    ) -> Any:
        self.asked.append((name, configuration, revision, options.get("split")))
        if (name, revision) in self.fails:
            raise self.fails[name, revision]
        folder = self.moved.get((name, revision)) or self.folder(name, revision)
        if folder is None:
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub (OfflineModeIsEnabled)")
        return self._load(str(folder), configuration, cache_dir=str(self.root / "cache"), **options)

    def folder(self, name: str, revision: str | None) -> Path | None:
        """What a repository holds at a revision."""
        entries = [entry for entry in sources.DATA if entry.name == name]
        if not entries or revision not in (None, "main", sources.PARQUET):
            return None
        folder = self.root / name.replace("/", "--") / (revision or "main").replace("/", "-")
        if not folder.exists():
            folder.mkdir(parents=True)
            WRITERS[name](folder, entries, revision)
        return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Hub:
    return Hub(tmp_path_factory.mktemp("hub"))


def connect(hub: Hub, patch: pytest.MonkeyPatch) -> Hub:
    """Have `datasets` and transformers see the simulated hub, and readers forget it afterwards."""
    patch.setattr(datasets, "load_dataset", hub.load_dataset)
    for reader in (glue_data, prompt_data, generation_data, vqa_data):
        cached: Any = reader._from_hub
        patch.setattr(reader, "_from_hub", functools.lru_cache(cached.__wrapped__))
    patch.setattr(opening, "_task", functools.lru_cache(opening._task.__wrapped__))
    patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub.root / "models"))
    return hub


def publish(hub: Hub, name: str, folder: Path, revision: str = "main") -> None:
    """Put a model's folder where the hub's client has it after a download."""
    place = hub.root / "models" / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT, dirs_exist_ok=True)


# -- rows -------------------------------------------------------------------------------------------------


def _texts(entry: sources.Data, split: str, hidden: bool, floats: bool) -> dict[str, list[Any]]:
    generator = random.Random(f"{entry.configuration}{split}")
    count = max(ROWS, 4 * len(entry.labels))
    found: dict[str, list[Any]] = {}
    for role, column in entry.columns.items():
        if role == "label":
            labels = [i % max(len(entry.labels), 1) for i in range(count)]
            found[column] = [round(5 * i / count, 2) for i in range(count)] if floats else labels
            if hidden:
                found[column] = [-1] * count
        else:
            found[column] = [f"{sentence(generator)} {split} {i}." for i in range(count)]
    return found


def _classes(entry: sources.Data) -> Features:
    """Texts as strings; labels as ClassLabel, of a score as float32; the index that GLUE has."""
    label = ClassLabel(names=list(entry.labels)) if entry.labels else Value("float32")
    return Features({c: label if role == "label" else Value("string") for role, c in entry.columns.items()})


def _parquet(table: datasets.Dataset, folder: Path, split: str, shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        name = f"{split}-{i:05d}-of-{shards:05d}.parquet"
        table.shard(shards, i, contiguous=True).to_parquet(str(folder / name))


def _readme(folder: Path, configurations: dict[str, dict[str, str]]) -> None:
    """The head of a data set's card, which says which files are which split of which configuration."""
    entries = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": path} for split, path in files.items()],
        }
        for name, files in configurations.items()
    ]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': entries})}---\n# a data set\n")


# -- repositories -----------------------------------------------------------------------------------------


def _glue(folder: Path, entries: Sequence[sources.Data], revision: str | None) -> None:
    files = {}
    for entry in entries:
        name = str(entry.configuration)
        features = _classes(entry)
        for split in entry.splits:
            rows = _texts(entry, split, split.startswith("test"), not entry.labels)
            table = datasets.Dataset.from_dict(rows, features=features)
            table = table.add_column("idx", list(range(len(table))))
            _parquet(table, folder / name, split, shards=2 if name in ("mnli", "qqp") else 1)
        files[name] = {split: f"{name}/{split}-*" for split in entry.splits}
    _readme(folder, files)


def _snli(folder: Path, entries: Sequence[sources.Data], revision: str | None) -> None:
    (entry,) = entries
    for split in entry.splits:
        rows = _texts(entry, split, False, False)
        rows["label"][1] = -1  # no gold label
        _parquet(datasets.Dataset.from_dict(rows, features=_classes(entry)), folder / "plain_text", split)
    _readme(folder, {"plain_text": {split: f"plain_text/{split}-*" for split in entry.splits}})


def _setfit(folder: Path, entries: Sequence[sources.Data], revision: str | None) -> None:
    """JSON lines: labels are plain numbers, their names stand beside them."""
    (entry,) = entries
    for split, file in {"train": "train", "validation": "dev", "test": "test"}.items():
        if split not in entry.splits:
            continue
        rows = _texts(entry, split, False, False)
        column = entry.columns["label"]
        numbers = rows[column]
        if column == "label_coarse_original":  # TREC-QC: numbers in the order in which classes occur
            order = ["DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC"]
            names = [entry.labels[n] for n in numbers]
            rows |= {column: names, "label_coarse": [order.index(n) for n in names], "label": numbers}
        else:
            rows["label_text"] = [entry.labels[n] for n in numbers]
        table = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


def _converted(folder: Path, entries: Sequence[sources.Data], revision: str | None) -> None:
    """A loading script on main; on the branch in Parquet a folder for each split."""
    (entry,) = entries
    if revision != sources.PARQUET:
        # the script's name is the repository's, which here is the folder's
        (folder / f"{folder.name}.py").write_text("raise SystemExit('was run')\n")
        return
    for split in entry.splits:
        rows = _texts(entry, split, False, False)
        features = Features({column: Value("string") for column in rows})
        if entry.labels:
            features = _classes(entry)
        else:  # E2E's meanings
            kinds = ("coffee shop", "pub", "restaurant")
            places = range(len(rows["meaning_representation"]))
            meanings = [f"name[Place {i}], eatType[{kinds[i % 3]}]" for i in places]
            rows["meaning_representation"] = meanings
        table = datasets.Dataset.from_dict(rows, features=features)
        place = folder / "default" / split
        place.mkdir(parents=True)
        table.to_parquet(str(place / "0000.parquet"))


def _gsm8k(folder: Path, entries: Sequence[sources.Data], revision: str | None) -> None:
    (entry,) = entries
    for configuration in ("main", "socratic"):
        for split in entry.splits:
            rows = _texts(entry, split, False, False)
            rows["answer"] = [f"so\n#### {i}" for i in range(len(rows["question"]))]
            _parquet(datasets.Dataset.from_dict(rows), folder / configuration, split)
    names = ("main", "socratic")
    _readme(folder, {n: {split: f"{n}/{split}-*" for split in entry.splits} for n in names})


def _scienceqa(folder: Path, entries: Sequence[sources.Data], revision: str | None) -> None:
    (entry,) = entries
    features = Features(
        {
            "image": datasets.Image(),
            "question": Value("string"),
            "choices": Listed(Value("string")),
            "answer": Value("int8"),
            "hint": Value("string"),
            "task": Value("string"),
            "grade": Value("string"),
            "subject": Value("string"),
            "lecture": Value("string"),
            "solution": Value("string"),
        }
    )
    noise = np.random.default_rng(0)
    for split in entry.splits:
        generator = random.Random(split)
        pictures = [Image.fromarray(noise.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(6)]
        rows = {
            "image": [*pictures, *[None] * 6],
            "question": [f"{sentence(generator)} {split} {i}?" for i in range(12)],
            "choices": [["red", "blue", "green"]] * 12,
            "answer": [i % 3 for i in range(12)],
            "hint": [sentence(generator) if i % 2 else "" for i in range(12)],
            **{name: ["x"] * 12 for name in ("task", "lecture", "solution")},
            "grade": ["grade2"] * 12,
            "subject": ["natural science"] * 12,
        }
        _parquet(datasets.Dataset.from_dict(rows, features=features), folder / "data", split)
    _readme(folder, {"default": {split: f"data/{split}-*" for split in entry.splits}})


WRITERS: dict[str, Callable[[Path, Sequence[sources.Data], str | None], None]] = {
    "nyu-mll/glue": _glue,
    "stanfordnlp/snli": _snli,
    "SetFit/sst5": _setfit,
    "SetFit/TREC-QC": _setfit,
    "CogComp/trec": _converted,
    "tuetschek/e2e_nlg": _converted,
    "openai/gsm8k": _gsm8k,
    "derek-thomas/ScienceQA": _scienceqa,
}
