"""CLIP as CLIP-LoRA trains it: crops, repeated images, a draw a seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.images.augmented import RATIO, SCALE, Augmented, crop_box
from tests.tasks.clip_cases import make, write_split
from tests.tasks.task_cases import clip_folder, write_images


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(clip_folder(tmp_path_factory.mktemp("models") / "clip")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", {"train": 12, "test": 5})


def test_a_crop_is_of_an_area_and_a_ratio_that_torchvision_allows() -> None:
    """Areas uniform, ratios log-uniform, both as far as a square of 400 pixels rounds them."""
    draw = np.random.default_rng(0)
    boxes = np.array([crop_box(400, 400, draw) for _ in range(4000)])
    assert boxes.min() >= 0
    assert boxes.max() <= 400
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = w * h / 400**2, w / h
    assert areas.min() > SCALE[0] * 0.97
    assert ratios.min() > RATIO[0] * 0.98
    assert ratios.max() < RATIO[1] * 1.02
    # large areas of an extreme ratio do not fit and are drawn again: the mean stays below the middle
    assert 0.45 < areas.mean() < (SCALE[0] + SCALE[1]) / 2 + 0.01
    assert abs(np.log(ratios).mean()) < 0.02


@pytest.mark.parametrize(("width", "height"), [(10, 400), (400, 10), (1, 1)])
def test_a_picture_in_which_nothing_fits_is_cropped_in_the_middle(width: int, height: int) -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        left, upper, right, lower = crop_box(width, height, draw)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height


def test_crops_depend_on_seed_epoch_and_image_alone(clip: PretrainedModel, images: Path) -> None:
    task = make(clip, images, augment=True)
    train = task.splits(0).train
    whole = [train[i]["pixel_values"] for i in range(3)]

    def pixels(epoch: int, seed: int = 0, order: tuple[int, ...] = (0, 1, 2)) -> list[torch.Tensor]:
        examples = task.training_examples(train, seed)
        assert isinstance(examples, Augmented)
        examples.epoch = epoch
        found = {i: examples[i]["pixel_values"] for i in order}
        return [found[i] for i in sorted(found)]

    first = pixels(1)
    assert [p.shape for p in first] == [p.shape for p in whole]
    assert all(map(torch.equal, first, pixels(1, order=(2, 0, 1))))
    for other in (pixels(2), pixels(1, seed=1), whole):
        assert not all(map(torch.equal, first, other))
    assert all(map(torch.equal, whole, [train[i]["pixel_values"] for i in range(3)]))
    plain = make(clip, images)
    assert plain.training_examples(train, 0) is train


def test_a_picture_is_mirrored_half_of_the_time(clip: PretrainedModel, images: Path) -> None:
    """Of a picture that is dark on the left and light on the right, every crop tells which way it is."""
    task = make(clip, images, augment=True)
    examples = task.training_examples(task.splits(0).train, 0)
    assert isinstance(examples, Augmented)
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (60, 1))).convert("RGB")

    class One:
        indices, pictures = [0], None

    One.pictures = type("Pictures", (), {"image": staticmethod(lambda index: ramp)})
    examples.whole = One  # type: ignore[assignment]
    mirrored = 0
    for epoch in range(200):
        examples.epoch = epoch
        row = np.asarray(examples.image(0).convert("L"))[0].astype(int)
        assert row[0] != row[-1]
        mirrored += row[0] > row[-1]
    assert 70 < mirrored < 130


def test_classes_with_too_few_images_are_refilled(clip: PretrainedModel, tmp_path: Path) -> None:
    data = write_split(tmp_path, counts=(3, 2, 4))
    task = make(clip, data, dataset="eurosat", shots=8, refill=True)
    for name, count in (("train", 8), ("validation", 4)):
        pictures, indices = task._draw.parts[name]
        assert Counter(pictures.labels[i] for i in indices) == dict.fromkeys(range(3), count)
        assert {*indices} <= {*range(len(pictures))}
    assert len(task.splits(0).train) == 24
    assert set(task._draw.short["train"].values()) == {3}  # and that they are few is recorded
    enough = [make(clip, data, dataset="eurosat", shots=2, refill=r)._draw.parts["train"][1] for r in (0, 1)]
    assert enough[0] == enough[1]


def test_the_runs_seed_draws_the_images(clip: PretrainedModel, tmp_path: Path) -> None:
    data = write_split(tmp_path, counts=(9, 5, 4))
    options = {"dataset": "eurosat", "shots": 2}
    task = make(clip, data, draw="run_seed", **options)
    drawn = {seed: task.splits(seed) for seed in (3, 4)}
    for part in ("train", "validation"):
        assert getattr(drawn[3], part).indices != getattr(drawn[4], part).indices
    assert drawn[3].test is drawn[4].test
    assert drawn[3].train.indices == make(clip, data, split_seed=3, **options).splits(0).train.indices
    before = task.fingerprint()
    # any image may be drawn: another one anywhere is another task
    file = sorted((data / "2750" / "blue").glob("train_*.png"))
    for path in file:
        Image.new("RGB", (20, 18), (1, 2, 3)).save(path)
    assert make(clip, data, draw="run_seed", **options).fingerprint() != before
