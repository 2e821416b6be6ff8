"""Image classification: Fashion-MNIST's real files, folders, the hub, and what is wrong with them."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.common.rgb import upright_size
from flatbench.tasks.images import image_data
from flatbench.tasks.images.image_classification import ImageClassification
from flatbench.training.trainer import fixed_batches
from tests.tasks.task_cases import real, vit_folder, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(vit_folder(tmp_path_factory.mktemp("models") / "vit")))


def make(model: PretrainedModel, data: Path, **options: Any) -> ImageClassification:
    return ImageClassification(model=model, data=str(data), **options)


def read(data: Path) -> Any:
    return image_data.read(str(data), None, None, "image", "label")


# -- Fashion-MNIST ----------------------------------------------------------------------------------------


@pytest.mark.data
def test_fashion_mnist_parses_whole() -> None:
    classes, found = read(real("fashion_mnist"))
    assert classes == tuple(map(str, range(10)))
    assert {split: len(part) for split, part in found.items()} == {"train": 60000, "test": 10000}
    assert set(Counter(found["train"].labels).values()) == {6000}
    assert set(Counter(found["test"].labels).values()) == {1000}
    assert found["train"].pixels.shape == (60000, 28, 28)
    image = found["test"].image(0)
    assert (image.mode, image.size) == ("RGB", (28, 28))


@pytest.mark.data
@pytest.mark.slow
def test_a_small_vit_learns_fashion_mnist(vit: PretrainedModel) -> None:
    """A few steps bring it well above chance on images that it did not see."""
    task = make(vit, real("fashion_mnist"), train_examples=400, validation_examples=100, test_examples=20)
    splits, model = task.splits(0), task.build_model(0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [400, 100, 20]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = task.evaluate(model, fixed_batches(task, splits.validation, 50, CPU))
    for _ in range(8):
        for batch in fixed_batches(task, splits.train, 20, CPU):
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
    after = task.evaluate(model, fixed_batches(task, splits.validation, 50, CPU))
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.35


# -- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ({"train": 10, "val": 4, "test": 5}, {"train": 30, "validation": 12, "test": 15}),
        ({"train": 10, "test": 5}, {"train": 27, "validation": 3, "test": 15}),
        ({"train": 10, "dev": 4}, {"train": 24, "validation": 12, "test": 6}),
        ({"": 10}, {"train": 21, "validation": 3, "test": 6}),
    ],
)
def test_folders(vit: PretrainedModel, tmp_path: Path, counts: dict[str, int], sizes: Any) -> None:
    task = make(vit, write_images(tmp_path / "images", counts))
    assert task.describe() == {"examples": sizes, "classes": ["a", "b", "c"]}
    splits = task.splits(0)
    for part in (splits.train, splits.validation, splits.test):
        shares = Counter(part.labels.tolist())
        assert max(shares.values()) - min(shares.values()) <= 1
    files = [pictures.paths[i] for pictures, indices in task.parts.values() for i in indices]
    assert len(set(files)) == len(files)


def write_idx(folder: Path, suffix: str = "", **changes: bytes) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 9)):
        pixels = generator.integers(0, 256, (count, 5, 4), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 3
        content = {
            f"{split}-images-idx3-ubyte": np.array([0x803, *pixels.shape], ">i4").tobytes()
            + pixels.tobytes(),
            f"{split}-labels-idx1-ubyte": np.array([0x801, count], ">i4").tobytes() + labels.tobytes(),
        }
        for name, raw in content.items():
            raw = changes.get(name.replace("-", "_"), raw)
            (folder / f"{name}{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return folder


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path: Path, suffix: str) -> None:
    classes, found = read(write_idx(tmp_path / "idx", suffix))
    assert classes == ("0", "1", "2")
    expected = np.random.default_rng(0).integers(0, 256, (30, 5, 4), dtype=np.uint8)
    assert np.array_equal(found["train"].pixels, expected)
    assert found["test"].labels == [0, 1, 2] * 3
    assert np.array_equal(np.asarray(found["train"].image(7))[..., 1], expected[7])


def hub(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    def load_dataset(name: str, configuration: Any, revision: Any) -> datasets.DatasetDict:
        def split(count: int, hidden: bool = False) -> datasets.Dataset:
            generator = np.random.default_rng(count)
            images = [
                Image.fromarray(generator.integers(0, 256, (6, 6), dtype=np.uint8)) for _ in range(count)
            ]
            labels = [-1 if hidden else i % 2 for i in range(count)]
            features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
            return datasets.Dataset.from_dict(
                {"image": images, "label": labels}, features=datasets.Features({**features, **changes})
            )

        return datasets.DatasetDict(train=split(40), validation=split(10), test=split(8, hidden=True))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_the_hub(vit: PretrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test split whose labels are hidden is no test set; one is held out instead."""
    hub(monkeypatch)
    task = ImageClassification(model=vit, data="some/images")
    assert task.describe() == {
        "examples": {"train": 32, "validation": 10, "test": 8},
        "classes": ["no", "yes"],
    }
    assert task.fingerprint() == ImageClassification(model=vit, data="some/images").fingerprint()
    assert task.splits(0).train[0]["pixel_values"].shape == (3, 16, 16)


# -- what the model sees ----------------------------------------------------------------------------------


def test_images_are_what_the_processor_makes(vit: PretrainedModel, tmp_path: Path) -> None:
    task = make(vit, write_images(tmp_path / "images", {"train": 10, "test": 2}))
    pictures, indices = task.parts["test"]
    with Image.open(pictures.paths[indices[3]]) as image:
        small = image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    expected = (torch.tensor(np.asarray(small)).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(task.splits(0).test[3]["pixel_values"], expected, atol=0.01, rtol=0)


def test_label_noise(vit: PretrainedModel, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", {"train": 12, "test": 2})
    clean, noisy = make(vit, data).splits(0), make(vit, data, label_noise=0.5)
    assert int((clean.train.labels != noisy.splits(0).train.labels).sum()) == 16  # of 33
    assert torch.equal(clean.test.labels, noisy.splits(0).test.labels)
    assert not torch.equal(noisy.splits(0).train.labels, noisy.splits(1).train.labels)
    noisy.splits(0).train[0]
    assert 0 in noisy.splits(1).train._cache  # images are prepared once for all seeds


def convolutional(folder: Path, kind: str) -> PretrainedModel:
    if kind == "convnext":
        ConvNextForImageClassification(
            ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1])
        ).save_pretrained(folder)
    else:
        ResNetForImageClassification(
            ResNetConfig(embedding_size=4, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
        ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return PretrainedModel(name_or_path=str(folder))


def test_convnext_is_adapted_in_its_linear_layers(tmp_path: Path) -> None:
    model = convolutional(tmp_path / "convnext", "convnext")
    task = make(model, write_images(tmp_path / "images", {"train": 10, "test": 2}))
    assert task.target_modules == ("pwconv1", "pwconv2")
    assert task.modules_to_save == ("classifier",)


def test_resnet_trains_in_full_and_has_nothing_to_adapt(tmp_path: Path) -> None:
    model = convolutional(tmp_path / "resnet", "resnet")
    task = make(model, write_images(tmp_path / "images", {"train": 10, "test": 2}))
    with pytest.raises(InputError, match=r"adapter.target_modules: .*'resnet'"):
        _ = task.target_modules
    found = task.evaluate(task.build_model(0), fixed_batches(task, task.splits(0).test, 3, CPU))
    assert set(found) == {"loss", "accuracy"}


# -- bad input --------------------------------------------------------------------------------------------


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_image_that_does_not_decode(vit: PretrainedModel, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    path = data / "test" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "test/b/1.png: does not decode as an image" in refused(make(vit, data).fingerprint)
    path.write_text("no image at all")
    assert "test/b/1.png: does not decode as an image" in refused(make(vit, data).fingerprint)


def test_pictures_are_upright_on_white_and_of_8_bits(vit: PretrainedModel, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    path = data / "test" / "b" / "1.png"
    drawn = Image.new("RGB", (6, 4), "white")
    drawn.paste("black", (0, 0, 3, 4))
    seen = np.asarray(drawn)

    turned = Image.fromarray(
        np.rot90(seen, axes=(0, 1)).copy()
    )  # as a camera stores it that was held upright
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    assert np.array_equal(np.asarray(image_data._decode(path)), seen)
    with Image.open(path) as opened:
        assert upright_size(opened) == drawn.size

    clear = Image.new("RGBA", drawn.size, (0, 0, 0, 0))  # black that is not there
    clear.paste((0, 0, 0, 255), (0, 0, 3, 4))
    clear.save(path)
    assert np.array_equal(np.asarray(image_data._decode(path)), seen)

    for pixels in (np.full((4, 6), 40_000, np.uint16), np.full((4, 6), 0.5, np.float32)):
        target = path if pixels.dtype == np.uint16 else path.with_suffix(".tiff")
        Image.fromarray(pixels).save(target)
        assert "of more than 8 bits, and nothing tells" in refused(make(vit, data).fingerprint)
        target.unlink()


def test_folders_that_are_wrong(vit: PretrainedModel, tmp_path: Path) -> None:
    assert "data: no such folder" in refused(make(vit, tmp_path / "nowhere").fingerprint)
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    (data / "test" / "d").mkdir()
    assert "test/d: no such class in" in refused(make(vit, data).fingerprint)
    (data / "test" / "d").rmdir()
    (data / "train" / "empty").mkdir()
    assert "train/empty: no images (.png, " in refused(make(vit, data).fingerprint)
    (tmp_path / "one" / "train" / "a").mkdir(parents=True)
    assert "expected a folder for each class, found 1" in refused(make(vit, tmp_path / "one").fingerprint)
    (tmp_path / "tests" / "test" / "a").mkdir(parents=True)
    assert "has test but no 'train'" in refused(make(vit, tmp_path / "tests").fingerprint)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("t10k_images_idx3_ubyte", b"\x00\x00\x08\x03", "not an IDX file of bytes in 3 dimensions"),
        ("t10k_images_idx3_ubyte", b"not an IDX file at all", "not an IDX file of bytes in 3 dimensions"),
        ("train_images_idx3_ubyte", np.array([0x803, 30, 5, 4], ">i4").tobytes() + b"123",
         "holds 3 values, but its header says (30, 5, 4)"),
        # sizes whose product is what there is, and none of an image
        ("train_images_idx3_ubyte", np.array([0x803, -30, -5, 4], ">i4").tobytes() + b"1" * 600,
         "holds 600 values, but its header says (-30, -5, 4)"),
        ("train_images_idx3_ubyte", np.array([0x803, 2**31 - 1, 2**31 - 1, 4], ">i4").tobytes() + b"1234",
         "holds 4 values, but its header says"),
        ("t10k_labels_idx1_ubyte", np.array([0x801, 2], ">i4").tobytes() + b"12",
         "9 test images, but 2 labels"),
        ("t10k_labels_idx1_ubyte", np.array([0x801, 9], ">i4").tobytes() + b"\x00" * 8 + b"\x07",
         "label 7 occurs in the test file only"),
    ],
)  # fmt: skip
def test_idx_files_that_are_wrong(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    assert said in refused(lambda: read(write_idx(tmp_path / "idx", **{name: raw})))


def test_idx_files_that_are_missing_or_cut(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "idx", ".gz")
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:12])
    assert "t10k-labels-idx1-ubyte.gz: cannot be read" in refused(lambda: read(folder))
    path.unlink()
    assert "data: no t10k-labels-idx1-ubyte (or .gz)" in refused(lambda: read(folder))


def test_the_hub_that_is_wrong(vit: PretrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ImageClassification(model=vit, data="nobody/no-images")
    assert "data: nobody/no-images: neither a local folder nor to be had" in refused(task.fingerprint)
    hub(monkeypatch, label=datasets.Value("int64"))
    task = ImageClassification(model=vit, data="some/images")
    assert "label_column: column 'label' of some/images holds no classes" in refused(task.fingerprint)
    task = ImageClassification(model=vit, data="some/images", image_column="photo")
    message = refused(task.fingerprint)
    assert "image_column: some/images has no column 'photo'; it has image, label" in message


def test_a_model_without_image_processor(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    model = PretrainedModel(name_or_path=str(folder))
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    assert "no image processor (preprocessor_config.json)" in refused(make(model, data).fingerprint)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_processor_of_another_model(tmp_path: Path, kind: str) -> None:
    """A ViT takes images of its size, other models of any."""
    model = vit_folder(tmp_path / "vit") if kind == "vit" else None
    path = model or Path(convolutional(tmp_path / "resnet", "resnet").name_or_path)
    ViTImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(path)
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    task = make(PretrainedModel(name_or_path=str(path)), data)
    if kind == "resnet":
        assert task.fingerprint()
    else:
        message = refused(task.fingerprint)
        assert (
            "its image processor makes images of shape (3, 48, 48), which the model does not take" in message
        )


def test_fingerprint_follows_images_labels_and_splits(vit: PretrainedModel, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    seen = [make(vit, data).fingerprint(), make(vit, data, split_seed=1).fingerprint()]
    assert make(vit, data).fingerprint() == seen[0]
    Image.new("RGB", (12, 10)).save(data / "test" / "a" / "0.png")
    seen.append(make(vit, data).fingerprint())
    (data / "test" / "a" / "0.png").rename(data / "test" / "b" / "z.png")
    seen.append(make(vit, data).fingerprint())
    assert len(set(seen)) == 4


def test_a_head_of_another_task_is_replaced(tmp_path: Path) -> None:
    folder = vit_folder(tmp_path / "vit")
    donor = ViTForImageClassification.from_pretrained(folder, num_labels=7)
    donor.save_pretrained(folder)
    data = write_images(tmp_path / "images", {"train": 10, "test": 2})
    task = make(PretrainedModel(name_or_path=str(folder)), data)
    assert task.build_model(0).classifier.weight.shape == (3, 16)
