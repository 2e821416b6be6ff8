"""Training images cropped and flipped at random, the same for a seed, an epoch and an image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flatbench.seeding import derive_seed
from flatbench.tasks.base import Example
from flatbench.tasks.images.image_classification import Prepared

#: shares of the image's area, and width over height, between which a crop is drawn (torchvision's defaults)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10


def crop_box(width: int, height: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of torchvision's RandomResizedCrop.

    An area uniform in `SCALE` and a ratio log-uniform in `RATIO`, at a uniform place; after ten that do not
    fit, the largest crop in the middle whose ratio is allowed.
    """
    for _ in range(ATTEMPTS):
        area = width * height * draw.uniform(*SCALE)
        ratio = math.exp(draw.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            return left, upper, left + w, upper + h
    w = min(width, round(height * RATIO[1]))
    h = min(height, round(width / RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


class Augmented(Sequence[Example]):
    """Images of a split, each in another crop and mirrored half of the time, as CLIP-LoRA trains.

    What is drawn for an image depends on the run's seed, the epoch and the image's place alone, so that a
    resumed run sees what it would have seen, whatever prepares its batches.

    Args:
        whole: the split, without augmentation.
        size: side of the square that the processor makes of an image.
        seed: the run's.

    Attributes:
        epoch: whose crops are drawn; set by whoever trains.
    """

    def __init__(self, whole: Prepared, size: int, seed: int) -> None:
        self.whole, self.size, self.seed = whole, size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: Any) -> Any:
        image = self.image(int(index))
        pixels = self.whole.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.whole.labels[index]}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def image(self, index: int) -> Image.Image:
        """The crop of the epoch, resized to a square by bicubic interpolation, perhaps mirrored."""
        draw = np.random.default_rng(derive_seed(self.seed, "augmentation", self.epoch, index))
        image = self.whole.pictures.image(self.whole.indices[index])
        box = crop_box(*image.size, draw)
        found = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else found
