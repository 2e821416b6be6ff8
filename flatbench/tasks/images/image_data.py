"""Labelled images: a folder with one subfolder a class, IDX files (as MNIST's), or a data set of the hub."""

from __future__ import annotations

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flatbench.config import sources
from flatbench.errors import InputError
from flatbench.store.files import known_digest
from flatbench.tasks.common import hub as from_hub
from flatbench.tasks.common.published_files import find, folder_of, read_bytes, read_once
from flatbench.tasks.common.rgb import in_rgb

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
#: what a folder or a split of each part may be called
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_INSTEAD = "give a folder with a folder for each class, or one of IDX files"
IDX = {"train": "train", "test": "t10k"}


class Pictures(ABC):
    """Images with their classes.

    Attributes:
        labels: class numbers.
    """

    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """An image in RGB. Raises InputError if it does not decode."""

    @abstractmethod
    def digest(self, indices: Sequence[int]) -> str:
        """Hex SHA-256 of some images and their labels."""

    @abstractmethod
    def content(self, index: int) -> str:
        """What two equal images have in common, whatever their labels: a digest."""

    @abstractmethod
    def check(self, indices: Sequence[int]) -> None:
        """Raise InputError if one of these images is evidently damaged; no full decoding of large ones."""


@dataclass(frozen=True)
class Files(Pictures):
    """Image files."""

    paths: Sequence[Path]
    labels: Sequence[int]

    def image(self, index: int) -> Image.Image:
        """An image in RGB. Raises InputError if it does not decode."""
        return _decode(self.paths[index])

    def digest(self, indices: Sequence[int]) -> str:
        """Hex SHA-256 of some images and their labels."""
        found = hashlib.sha256()
        for i in indices:
            found.update(f"{self.labels[i]}:{known_digest(self.paths[i])}\n".encode())
        return found.hexdigest()

    def content(self, index: int) -> str:
        """The file's digest."""
        return known_digest(self.paths[index])

    def check(self, indices: Sequence[int]) -> None:
        """Raise InputError if one of these images does not decode; a file that does is asked once."""
        for i in indices:
            state = self.paths[i].stat()
            _decodes(self.paths[i], state.st_mtime_ns, state.st_size)


def _decode(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return in_rgb(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: does not decode as an image: {error}") from error


@functools.lru_cache(maxsize=100_000)
def _decodes(path: Path, mtime_ns: int, size: int) -> None:
    _decode(path)


@dataclass(frozen=True)
class Pixels(Pictures):
    """Grey images of one size, ``(N, height, width)`` uint8."""

    pixels: NDArray[np.uint8]
    labels: Sequence[int]

    def image(self, index: int) -> Image.Image:
        """An image in RGB."""
        return Image.fromarray(self.pixels[index]).convert("RGB")

    def digest(self, indices: Sequence[int]) -> str:
        """Hex SHA-256 of some images and their labels."""
        chosen = list(indices)
        found = hashlib.sha256(np.ascontiguousarray(self.pixels[chosen]).tobytes())
        found.update(repr([int(self.labels[i]) for i in chosen]).encode())
        return found.hexdigest()

    def content(self, index: int) -> str:
        """Digest of the pixels."""
        return hashlib.sha256(self.pixels[index].tobytes()).hexdigest()

    def check(self, indices: Sequence[int]) -> None:
        """Pixels need no decoding."""


@dataclass(frozen=True)
class Table(Pictures):
    """A split of a data set of the hub."""

    rows: Any
    column: str
    name: str
    labels: Sequence[int]
    #: digests of the images that were decoded for `digest`
    _contents: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def image(self, index: int) -> Image.Image:
        """An image in RGB. Raises InputError if it does not decode."""
        try:
            found = in_rgb(self.rows[int(index)][self.column])
        except (OSError, SyntaxError, ValueError, AttributeError) as error:
            raise InputError(f"{self.name}, row {index}: does not decode as an image: {error}") from error
        return found

    def digest(self, indices: Sequence[int]) -> str:
        """Hex SHA-256 of some images and their labels."""
        found = hashlib.sha256()
        for i in indices:
            pixels = self.image(i).tobytes()
            self._contents[i] = hashlib.sha256(pixels).hexdigest()
            found.update(f"{self.labels[i]}:".encode() + pixels)
        return found.hexdigest()

    def content(self, index: int) -> str:
        """Digest of the image as it is decoded."""
        if index not in self._contents:
            self._contents[index] = hashlib.sha256(self.image(index).tobytes()).hexdigest()
        return self._contents[index]

    def check(self, indices: Sequence[int]) -> None:
        """`digest` has decoded them all."""


def image_columns(image: str, label: str, columns: Mapping[str, str] | None) -> tuple[str, str]:
    """The columns of images and classes. Raises InputError for ``columns`` for anything else."""
    found = dict(from_hub.mapped({"image": image, "label": label}, columns))
    return found["image"], found["label"]


def source(
    data: str, configuration: str | None, revision: str | None, image_column: str, label_column: str
) -> from_hub.Source:
    """Where images come from; arguments as of `read`. Raises InputError for unusable ones."""
    if folder_of(data, owner=False) is not None:
        return from_hub.Source(None, None, ())
    columns = (("image", image_column), ("label", label_column))
    wanted = from_hub.Wanted(data, configuration, revision, columns, _INSTEAD)
    return from_hub.Source(sources.data(data, configuration), wanted, ("train",))


def read(
    data: str, configuration: str | None, revision: str | None, image_column: str, label_column: str
) -> tuple[tuple[str, ...], dict[str, Pictures]]:
    """Names of the classes, and the sources that are there: train, and perhaps validation and test.

    Raises:
        InputError: nothing is there, or it is not as its format demands.
    """
    path = folder_of(data, owner=False)
    if path is not None:
        if _idx_file(path, "train", "images", 3) is not None:
            return _read_idx(path)
        return _read_folder(path)
    return _from_hub(data, configuration, revision, image_column, label_column)


# -- folders ----------------------------------------------------------------------------------------------


def _read_folder(path: Path) -> tuple[tuple[str, ...], dict[str, Pictures]]:
    roots: dict[str, Path] = {}
    for split, names in SPLITS.items():
        for name in names:
            if (path / name).is_dir():
                roots.setdefault(split, path / name)
    if "train" not in roots:
        if roots:
            raise InputError(f"data: {path} has {', '.join(p.name for p in roots.values())} but no 'train'")
        roots = {"train": path}
    classes = tuple(sorted(p.name for p in roots["train"].iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise InputError(f"data: {roots['train']}: expected a folder for each class, found {len(classes)}")
    found: dict[str, Pictures] = {}
    for split, root in roots.items():
        unknown = sorted({p.name for p in root.iterdir() if p.is_dir()} - set(classes))
        if unknown:
            raise InputError(f"data: {root / unknown[0]}: no such class in {roots['train']}")
        paths, labels = [], []
        for number, name in enumerate(classes):
            members = sorted(p for p in (root / name).rglob("*") if p.suffix.lower() in ENDINGS)
            paths += members
            labels += [number] * len(members)
            if not members and split == "train":
                raise InputError(f"data: {root / name}: no images ({', '.join(ENDINGS)})")
        if not paths:
            raise InputError(f"data: {root}: no images")
        found[split] = Files(paths, labels)
    return classes, found


# -- IDX files --------------------------------------------------------------------------------------------


def _idx_file(folder: Path, split: str, what: str, dimensions: int) -> Path | None:
    return find(folder, [f"{IDX[split]}-{what}{mark}idx{dimensions}-ubyte" for mark in "-."])


def _read_idx(folder: Path) -> tuple[tuple[str, ...], dict[str, Pictures]]:
    found: dict[str, Pictures] = {}
    for split in IDX:
        pixels, labels = _idx(folder, split, "images", 3), _idx(folder, split, "labels", 1)
        if len(pixels) != len(labels):
            raise InputError(f"data: {folder}: {len(pixels)} {split} images, but {len(labels)} labels")
        found[split] = Pixels(pixels, labels.tolist())
    count = max(found["train"].labels) + 1
    if max(found["test"].labels) >= count:
        raise InputError(f"data: {folder}: label {max(found['test'].labels)} occurs in the test file only")
    return tuple(map(str, range(count))), found


def _idx(folder: Path, split: str, what: str, dimensions: int) -> NDArray[np.uint8]:
    path = _idx_file(folder, split, what, dimensions)
    if path is None:
        raise InputError(f"data: no {IDX[split]}-{what}-idx{dimensions}-ubyte (or .gz) in {folder}")
    return _parse(path, dimensions)


@read_once(kept=8)
def _parse(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, type 8, number of dimensions, each as big-endian int32, the values."""
    raw = read_bytes(path)
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) < 4 + 4 * dimensions:
        raise InputError(f"{path}: not an IDX file of bytes in {dimensions} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">i4", dimensions, 4))
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if min(shape) < 1 or values.size != math.prod(shape):  # whole numbers of Python, which do not overflow
        raise InputError(f"{path}: holds {values.size} values, but its header says {shape}")
    return values.reshape(shape)


# -- the hub ----------------------------------------------------------------------------------------------


def _from_hub(
    name: str, configuration: str | None, revision: str | None, image_column: str, label_column: str
) -> tuple[tuple[str, ...], dict[str, Pictures]]:
    loaded: Any = from_hub.load(
        name,
        configuration,
        revision=revision,
        instead=_INSTEAD,
    )
    named = {split: next((n for n in names if n in loaded), None) for split, names in SPLITS.items()}
    if named["train"] is None:
        raise InputError(f"data: {name}: {from_hub.no_split('train', ', '.join(loaded), _INSTEAD)}")
    columns = loaded[named["train"]].features
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in columns:
            role = option.removesuffix("_column")
            raise InputError(
                f"{option}: {name} has no column '{column}'; it has {', '.join(columns)}; say which it is, "
                f"as columns: {{{role}: …}}"
            )
    if not isinstance(columns[image_column], datasets.Image):
        raise InputError(
            f"image_column: column '{image_column}' of {name} holds no images; say which does, as columns: "
            "{image: …}"
        )
    if not isinstance(columns[label_column], datasets.ClassLabel):
        raise InputError(
            f"label_column: column '{label_column}' of {name} holds no classes; say which does, as columns: "
            "{label: …}"
        )
    found: dict[str, Pictures] = {}
    for split, part in named.items():
        if part is not None and min(loaded[part][label_column]) >= 0:  # hidden labels are -1
            rows = loaded[part]
            found[split] = Table(rows, image_column, f"{name} ({part})", list(rows[label_column]))
    return tuple(columns[label_column].names), found
