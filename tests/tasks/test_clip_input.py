"""CLIP by class prompts: CoOp's split files, models and processors, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.images.clip_data import DATA
from flatbench.training.trainer import fixed_batches
from tests.tasks.clip_cases import files, make, write_split
from tests.tasks.task_cases import bert_folder, clip_folder, real, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(clip_folder(tmp_path_factory.mktemp("models") / "clip")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", {"train": 12, "test": 5})


# -- CoOp's layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATA)
def test_the_published_layout(clip: PretrainedModel, tmp_path: Path, dataset: str) -> None:
    """Found from the folder of all data sets and from the data set's own, with its usual prompt."""
    folder = write_split(tmp_path / "all" / dataset, dataset)
    found = []
    for data in (tmp_path / "all", folder):
        task = make(clip, data, dataset=dataset, shots=4)
        assert task.classes == ("dark red", "sea green", "blue")
        assert task.prompts[0] == DATA[dataset].template.replace("{}", "dark red")
        assert task.describe()["examples"] == {"train": 12, "validation": 12, "test": 12}
        assert all("/train_" in path for path in files(task)["train"])
        assert all("/val_" in path for path in files(task)["validation"])
        found.append(task.fingerprint())
    assert found[0] == found[1]
    other = make(clip, folder, dataset=dataset, shots=4, template="{}")
    assert other.fingerprint() != found[0]


def test_a_split_file_of_ones_own(clip: PretrainedModel, tmp_path: Path) -> None:
    folder = write_split(tmp_path / "eurosat")
    task = make(clip, folder / "2750", split_file=str(folder / DATA["eurosat"].split), shots=2)
    assert task.prompts[2] == "a photo of a blue."
    assert task.describe()["examples"] == {"train": 6, "validation": 6, "test": 12}


@pytest.mark.data
def test_fashion_mnist_with_names(clip: PretrainedModel) -> None:
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
    task = make(clip, real("fashion_mnist"), class_names=names, shots=4, test_examples=50)
    assert task.describe()["examples"] == {"train": 40, "validation": 40, "test": 50}
    assert task.prompts[9] == "a photo of a boot."
    model = task.build_model(0)
    found = task.evaluate(model, fixed_batches(task, task.splits(0).test, 25, CPU))
    assert 0 <= found["accuracy"] <= 1


# -- bad input --------------------------------------------------------------------------------------------


def refused(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_templates_and_names(clip: PretrainedModel, images: Path) -> None:
    assert "template: 'a photo': {}, the class's name" in refused(
        lambda: make(clip, images, template="a photo")
    )
    assert "must stand in it once, not 2 times" in refused(lambda: make(clip, images, template="{} or {}"))
    assert "leave out one of dataset and split_file" in refused(
        lambda: make(clip, images, dataset="dtd", split_file="split.json")
    )
    task = make(clip, images, class_names=["one", "two"])
    assert "class_names: 2 names for 3 classes (a, b, c)" in refused(task.fingerprint)
    task = make(clip, images, class_names=["Cat", "dog", "cat"])  # CLIP's tokenizer writes all small
    assert "class_names: 'Cat' and 'cat' have the same prompt" in refused(task.fingerprint)


def test_long_prompts_are_cut_and_counted(clip: PretrainedModel, images: Path) -> None:
    task = make(clip, images, class_names=["cat", "dog", "bird " * 20], template="{} in a picture")
    assert task.describe()["truncated_prompts"] == 1
    task.fingerprint()
    task = make(clip, images, template="picture " * 12 + "{}")
    assert "have the same prompt" in refused(task.fingerprint)  # what tells them apart is cut off


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"val": None}, "no part 'val' with images; a split file has train, val and test"),
        ({"test": []}, "no part 'test' with images"),
        ({"test": [["blue/test_0.png", 3, "violet"]]}, "test, row 1: label 3 ('violet') is none of train's"),
        ({"val": [["blue/val_0.png", 1, "blue"]]}, "val, row 1: label 1 ('blue') is 'sea green' in train"),
        ({"val": [["blue/val_0.png", "2", "blue"]]}, "val, row 1: expected [image, label from 0 on, "),
        ({"val": [["blue/val_0.png", -1, "blue"]]}, "val, row 1: expected [image, label from 0 on, "),
        ({"test": [["blue/lost.png", 2, "blue"]]}, "1 of its images are not there, as "),
        ({"train": [["blue/train_0.png", 1, "blue"]]}, "train has no image with label 0"),
    ],
)  # fmt: skip
def test_split_files_that_are_wrong(
    clip: PretrainedModel, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    if "train" in changes:
        changes = {**changes, "val": changes["train"], "test": changes["train"]}
    task = make(clip, write_split(tmp_path / "eurosat", **changes), dataset="eurosat")
    message = refused(task.fingerprint)
    assert said in message
    assert "split_zhou_EuroSAT.json" in message


def test_files_that_are_not_there_or_no_images(clip: PretrainedModel, tmp_path: Path) -> None:
    assert "data: no such folder" in refused(make(clip, tmp_path / "no", dataset="dtd").fingerprint)
    folder = write_split(tmp_path / "all" / "eurosat")
    message = refused(make(clip, folder, dataset="dtd").fingerprint)
    assert "one split_zhou_DescribableTextures.json is needed, and there are none" in message
    write_split(tmp_path / "all" / "again")
    message = refused(make(clip, tmp_path / "all", dataset="eurosat").fingerprint)
    assert "and there are several: " in message
    path = folder / "2750" / "blue" / "test_1.png"
    path.write_bytes(path.read_bytes()[:40])
    task = make(clip, folder, dataset="eurosat")
    for _ in range(2):  # a file that does not decode is asked again
        assert "blue/test_1.png: does not decode as an image" in refused(task.fingerprint)
    (folder / "split_zhou_EuroSAT.json").write_text("{")
    message = refused(make(clip, folder, dataset="eurosat").fingerprint)
    assert "split_zhou_EuroSAT.json: not JSON" in message
    (folder / "2750").rename(folder / "images")
    assert "there is no such folder" in refused(make(clip, folder, dataset="eurosat").fingerprint)


def test_too_few_images(clip: PretrainedModel, images: Path, tmp_path: Path) -> None:
    message = refused(make(clip, images, shots=12).fingerprint)
    assert "shots: 12 images of each class leave none for validation" in message
    data = write_images(tmp_path / "images", {"train": 3, "test": 2})
    for path in (data / "train" / "b").iterdir():
        path.unlink()
    assert "train/b: no images" in refused(make(clip, data).fingerprint)


def changed(folder: Path, **config: Any) -> PretrainedModel:
    clip_folder(folder, **config)
    return PretrainedModel(name_or_path=str(folder))


def test_models_and_processors_that_do_not_fit(images: Path, tmp_path: Path) -> None:
    model = PretrainedModel(name_or_path=str(bert_folder(tmp_path / "bert")))
    assert "a model of type 'bert', and no CLIP" in refused(make(model, images).fingerprint)

    model = changed(tmp_path / "small")
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        model.name_or_path
    )
    message = refused(make(model, images).fingerprint)
    assert "its image processor makes images of shape (3, 8, 8), but the model takes (3, 16, 16)" in message

    model = changed(tmp_path / "words", text_config={"vocab_size": 100, "eos_token_id": 99})
    assert "its tokenizer has 514 tokens, but its embedding only 100" in refused(
        make(model, images).fingerprint
    )

    model = changed(tmp_path / "end", text_config={"eos_token_id": 5})
    message = refused(make(model, images).fingerprint)
    assert "its tokenizer does not end a text with the token that the model looks for" in message


def test_early_clips_end_a_text_with_their_largest_token(images: Path, tmp_path: Path) -> None:
    task = make(changed(tmp_path / "early", text_config={"eos_token_id": 2}), images)
    task.fingerprint()
    batch = task.collate([task.splits(0).test[0]])
    assert task.build_model(0)(**batch).logits.shape == (1, 3)


def test_a_folder_that_the_whole_processor_wrote(images: Path, tmp_path: Path) -> None:
    model = changed(tmp_path / "whole")
    folder = Path(model.name_or_path)
    expected = make(model, images).splits(0).test[0]["pixel_values"]
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    )
    (folder / "preprocessor_config.json").unlink()
    processor.save_pretrained(folder)
    assert torch.equal(make(model, images).splits(0).test[0]["pixel_values"], expected)


def test_files_of_a_part_of_clip(images: Path, tmp_path: Path) -> None:
    model = changed(tmp_path / "part")
    folder = Path(model.name_or_path)
    whole = CLIPModel.from_pretrained(folder)
    weights = {k: v for k, v in whole.state_dict().items() if "projection" not in k}
    whole.save_pretrained(folder, state_dict=weights)
    message = refused(lambda: make(model, images).build_model(0))
    assert "its files are no whole CLIP; they lack 2 weights, as text_projection.weight" in message


def test_images_are_what_the_processor_makes(clip: PretrainedModel, images: Path) -> None:
    task = make(clip, images)
    with Image.open(files(task)["test"][3]) as image:
        small = image.convert("RGB").resize((16, 19), Image.Resampling.BICUBIC)
    # 10 wide, 12 high: the shorter side becomes 16, and the middle is cut out
    pixels = torch.tensor(np.asarray(small)[1:17].copy()).permute(2, 0, 1) / 255
    processor = CLIPImageProcessorPil.from_pretrained(clip.name_or_path)
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    found = task.splits(0).test[3]["pixel_values"]
    torch.testing.assert_close(found, (pixels - mean) / std, atol=0.05, rtol=0)
    assert CLIPConfig.from_pretrained(clip.name_or_path).vision_config.image_size == found.shape[-1]
