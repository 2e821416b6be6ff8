"""Images and class names for few-shot CLIP: CoOp's split files, and few-shot draws from any source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flatbench.errors import InputError
from flatbench.security.paths import inside
from flatbench.seeding import derive_seed
from flatbench.tasks.common.published_files import read_json
from flatbench.tasks.common.splitting import stratified
from flatbench.tasks.images.image_data import Files, Pictures


@dataclass(frozen=True)
class Published:
    """A data set in the layout of CoOp (Zhou et al. 2022, arXiv 2109.01134).

    Attributes:
        split: name of the split file.
        images: folder of the images, beside the split file.
        template: the prompt that is usual for these classes.
    """

    split: str
    images: str
    template: str


DATA = {
    "eurosat": Published("split_zhou_EuroSAT.json", "2750", "a centered satellite photo of {}."),
    "oxford_pets": Published("split_zhou_OxfordPets.json", "images", "a photo of a {}, a type of pet."),
    "oxford_flowers": Published("split_zhou_OxfordFlowers.json", "jpg", "a photo of a {}, a type of flower."),
    "caltech101": Published("split_zhou_Caltech101.json", "101_ObjectCategories", "a photo of a {}."),
    "dtd": Published("split_zhou_DescribableTextures.json", "images", "{} texture."),
}
#: what the parts are called in split files
PARTS = {"train": "train", "validation": "val", "test": "test"}

Source = tuple[tuple[str, ...], dict[str, Pictures]]


def read(dataset: str, data: str) -> Source:
    """Names of the classes and the three parts of a published data set.

    Args:
        data: the data set's folder, or the one in which its folder lies.

    Raises:
        InputError: no such file or folder, or one that is not as CoOp publishes it.
    """
    published, root = DATA[dataset], Path(data).expanduser()
    if not root.is_dir():
        raise InputError(f"data: no such folder: {data}")
    found = [path for pattern in ("", "*/") for path in sorted(root.glob(f"{pattern}{published.split}"))]
    if len(found) != 1:
        many = f"several: {', '.join(map(str, found))}" if found else "none in this folder or those in it"
        raise InputError(f"data: {data}: one {published.split} is needed, and there are {many}")
    return read_split(found[0], found[0].parent / published.images)


def read_split(path: Path, images: Path) -> Source:
    """Names of the classes and the three parts that a split file names.

    The file is ``{"train": [[image, label, class name], …], "val": …, "test": …}``, with images relative to
    the folder ``images`` and labels from 0 on. A ``_`` in a class name stands for a space.

    Raises:
        InputError: no such folder, a file that is not like this, a part that it lacks, a label that is not
            among those of "train", two names for one label, images that are not there.
    """
    if not images.is_dir():
        raise InputError(f"data: {path.name} needs its images in {images}, and there is no such folder")
    content = _content(path)
    names: dict[int, str] = {}
    parts = {}
    for part, key in PARTS.items():
        rows = [_row(row, f"{path}: {key}, row {i}") for i, row in enumerate(content[key], 1)]
        for i, (_, label, name) in enumerate(rows, 1):
            if key == "train":
                names.setdefault(label, name)
            if names.get(label) != name:
                said = f"is '{names[label]}' in train" if label in names else "is none of train's"
                raise InputError(f"{path}: {key}, row {i}: label {label} ('{name}') {said}")
        parts[part] = rows
    if sorted(names) != list(range(len(names))):
        gap = next(label for label in range(len(names)) if label not in names)
        raise InputError(f"{path}: train has no image with label {gap}; labels count from 0 without gaps")
    found: dict[str, Pictures] = {}
    missing: list[Path] = []
    for part, rows in parts.items():
        files = [inside(images, image, f"{path}: {PARTS[part]}") for image, _, _ in rows]
        missing += [file for file in files if not file.is_file()]
        found[part] = Files(files, [label for _, label, _ in rows])
    if missing:
        raise InputError(f"{path}: {len(missing)} of its images are not there, as {missing[0]}")
    return tuple(names[label] for label in range(len(names))), found


def _content(path: Path) -> Mapping[str, Sequence[Any]]:
    content = read_json(path)
    for key in PARTS.values():
        if not isinstance(content, dict) or not isinstance(content.get(key), list) or not content[key]:
            raise InputError(f"{path}: no part '{key}' with images; a split file has train, val and test")
    parts: Mapping[str, Sequence[Any]] = content
    return parts


def _row(row: Any, where: str) -> tuple[str, int, str]:
    if isinstance(row, list) and [type(value) for value in row] == [str, int, str] and row[1] >= 0:
        return row[0], row[1], row[2].replace("_", " ")
    raise InputError(f"{where}: expected [image, label from 0 on, class name], not {json.dumps(row)[:100]}")


@dataclass(frozen=True)
class Drawn:
    """The images of a few-shot task.

    Attributes:
        parts: train, validation and test -> images and which of them, in ascending order.
        short: part -> class -> images that it has, where these are fewer than wanted.
    """

    parts: dict[str, tuple[Pictures, list[int]]]
    short: dict[str, dict[str, int]]


def draw(
    classes: Sequence[str],
    sources: Mapping[str, Pictures],
    shots: int,
    validation_shots: int,
    test_examples: int | None,
    seed: int,
    refill: bool = False,
) -> Drawn:
    """So many images of each class for train and for validation, and the test set.

    A class with fewer gives what it has, or with ``refill`` so many drawn from these with repetition, as in
    CoOp's and CLIP-LoRA's code, train and validation alike. Fewer shots of one seed are among its more shots.
    Validation images come from the source of that name, or from what train leaves; test is the source of that
    name, or a stratified fifth of the training images, at most 1,000, that is held out first.

    Raises:
        InputError: a class without a training image, or nothing is left for validation.
    """
    train = sources["train"]
    pool = np.arange(len(train))
    if "test" in sources:
        test = sources["test"]
        size = None if test_examples is None else min(test_examples, len(test))
        tested, _ = stratified(np.arange(len(test)), size, test.labels, seed, "test_examples")
    else:
        test, size = train, test_examples or max(1, min(len(pool) // 5, 1000))
        tested, pool = stratified(pool, size, train.labels, seed, "test_examples")
    shuffled = _by_class(train, pool.tolist(), len(classes), seed, "shots")
    for name, members in zip(classes, shuffled, strict=True):
        if not members:
            raise InputError(f"data: class '{name}' has no image to train on")
    taken = [members[:shots] for members in shuffled]
    if "validation" in sources:
        validation = sources["validation"]
        everything = list(range(len(validation)))
        others = _by_class(validation, everything, len(classes), seed, "validation shots")
    else:
        validation, others = train, [members[shots:] for members in shuffled]
    held = [members[:validation_shots] for members in others]
    if not any(held):
        raise InputError(f"shots: {shots} images of each class leave none for validation; take fewer")
    wanted = {"train": (taken, shots), "validation": (held, validation_shots)}
    short = {
        part: {name: len(m) for name, m in zip(classes, chosen, strict=True) if len(m) < count}
        for part, (chosen, count) in wanted.items()
    }
    if refill:
        again = np.random.default_rng(derive_seed(seed, "refill"))
        taken = [_refill(members, shots, again) for members in taken]
        held = [_refill(members, validation_shots, again) for members in held]
    return Drawn(
        {
            "train": (train, sorted(i for members in taken for i in members)),
            "validation": (validation, sorted(i for members in held for i in members)),
            "test": (test, tested.tolist()),
        },
        short,
    )


def _refill(members: list[int], count: int, draw: np.random.Generator) -> list[int]:
    """The members, or ``count`` drawn from them with repetition where there are fewer."""
    if not 0 < len(members) < count:
        return members
    return [members[i] for i in draw.integers(len(members), size=count)]


def _by_class(
    pictures: Pictures, pool: Sequence[int], classes: int, seed: int, stream: str
) -> list[list[int]]:
    """Members of the pool by class, in an order drawn from a stream of the seed."""
    found: list[list[int]] = [[] for _ in range(classes)]
    for i in np.random.default_rng(derive_seed(seed, stream)).permutation(len(pool)):
        found[pictures.labels[pool[i]]].append(pool[i])
    return found
