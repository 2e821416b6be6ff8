"""CLIP by class prompts: zero-shot logits, few-shot draws, CoOp's split files, learning, and bad input."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from task_cases import bert_folder, clip_folder, real, write_images
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from flatbench import adapters, runner, store
from flatbench.errors import InputError
from flatbench.landscape.evaluate import Evaluator
from flatbench.measures.base import Subject
from flatbench.measures.spaces import in_space
from flatbench.options import AdapterOptions
from flatbench.plan import Plan
from flatbench.study import Study
from flatbench.tasks.clip_classification import ClipClassification
from flatbench.tasks.clip_data import DATA
from flatbench.tasks.pretrained import PretrainedModel
from flatbench.training import fixed_batches

CPU = torch.device("cpu")
COLOURS = {"dark_red": (120, 10, 10), "sea green": (20, 150, 90), "blue": (10, 10, 220)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(clip_folder(tmp_path_factory.mktemp("models") / "clip")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", {"train": 12, "test": 5})


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


# -- what the model answers -------------------------------------------------------------------------------


def test_zero_shot_logits_are_clips_own(clip: PretrainedModel, images: Path) -> None:
    """CLIPModel's ``logits_per_image``, with the prompts padded to all of its positions."""
    task = make(clip, images, class_names=["cat", "a longer name", "dog"], template="a photo of a {}.")
    batch = task.collate([task.splits(0).test[i] for i in range(6)])
    folder = clip.name_or_path
    tokens = CLIPTokenizer.from_pretrained(folder)(
        ["a photo of a cat.", "a photo of a a longer name.", "a photo of a dog."],
        padding="max_length",
        max_length=77,
        return_tensors="pt",
    )
    with torch.no_grad():
        plain = CLIPModel.from_pretrained(folder).eval()
        expected = plain(pixel_values=batch["pixel_values"], **tokens).logits_per_image
        loss, logits = task.outputs(task.build_model(0).eval(), batch)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    chosen = expected.log_softmax(-1)[torch.arange(6), batch["labels"]]
    assert float(loss) == pytest.approx(-float(chosen.mean()), rel=1e-5)


def test_low_precision_keeps_the_logits_apart(clip: PretrainedModel, images: Path) -> None:
    """The product with the scale is in float32, for bfloat16 weights and within autocast."""
    task = make(clip, images)
    batch = task.collate([task.splits(0).test[i] for i in range(15)])
    exact = task.build_model(0).eval()
    low = make(PretrainedModel(name_or_path=clip.name_or_path, dtype="bfloat16"), images).build_model(0)
    with torch.no_grad():
        expected = exact(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            automatic = exact(**batch).logits
        found = low.eval()(**batch).logits
    for logits in (automatic, found):
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())
        torch.testing.assert_close(logits, expected, atol=0.3, rtol=0.05)


def test_the_adapter_is_on_both_encoders_and_both_get_gradients(clip: PretrainedModel, images: Path) -> None:
    task = make(clip, images)
    model = adapters.adapt(task.build_model(0), AdapterOptions(r=2, alpha=1), task.target_modules, ())
    factors = adapters.lora_factors(model)
    names = [factor.name.removeprefix("base_model.model.") for factor in factors]
    assert len(names) == 6  # query, key and value of one layer in each encoder
    assert Counter(name.partition(".")[0] for name in names) == {"text_model": 3, "vision_model": 3}
    batch = task.collate([task.splits(0).train[i] for i in range(6)])
    before = task.outputs(model.eval(), batch)[1]
    task.loss(model, batch).backward()
    for factor in factors:
        if "v_proj" in factor.name:
            assert factor.B.grad is not None
            assert bool(factor.B.grad.any())
    text = next(f for f in factors if "text_model" in f.name and "v_proj" in f.name)
    with torch.no_grad():
        text.B.add_(1.0)  # the prompts are encoded anew with what the text encoder has become
        assert not torch.allclose(task.outputs(model, batch)[1], before)


def test_batch_size_does_not_change_the_metric(clip: PretrainedModel, images: Path) -> None:
    task = make(clip, images)
    model, examples = task.build_model(0), task.splits(0).test
    found = [task.evaluate(model, fixed_batches(task, examples, size, CPU)) for size in (1, 4, 15)]
    for other in found[1:]:
        assert other["accuracy"] == found[0]["accuracy"]
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("stack", [2, 3])
def test_points_of_a_slice_do_not_mix_with_prompts(clip: PretrainedModel, images: Path, stack: int) -> None:
    """Stacked points repeat the images but not the prompts; with as many classes the shapes even fit."""
    task = make(clip, images, class_names=["cat", "trouser", "7"], template="{}")
    model, batch = task.build_model(0).eval(), task.collate([task.splits(0).test[0]])
    with torch.no_grad():
        model.logit_scale.fill_(4.6)  # random encoders tell little apart: a trained CLIP's scale
    names = adapters.adapted_modules(model, task.target_modules)
    subject = Subject(model, [batch], lambda m, b: (task.loss(m, b), task.terms(b)), names, 0)
    positions = [[0.5], [1.0], [-1.0]]
    with in_space(subject, "merged") as point:
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=generator) for p in point.parameters.values()]
        found = []
        for count in (1, stack):
            with Evaluator(point, subject.loss, {"train": [batch]}, [[direction]], stack=count) as evaluator:
                found.append([value["train"]["loss"] for value in evaluator.at(0, positions)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert min(abs(a - b) for a, b in itertools.combinations(found[0], 2)) > 1e-3


# -- few-shot draws ---------------------------------------------------------------------------------------


def files(task: ClipClassification) -> dict[str, list[str]]:
    return {name: [str(p.paths[i]) for i in indices] for name, (p, indices) in task._drawn.parts.items()}


@pytest.mark.parametrize(("shots", "validation"), [(1, 1), (4, 4), (6, 4)])
def test_so_many_of_each_class(clip: PretrainedModel, images: Path, shots: int, validation: int) -> None:
    """As many for validation, but at most 4, drawn from what train leaves where there is no such set."""
    task = make(clip, images, shots=shots)
    splits = task.splits(0)
    assert set(Counter(splits.train.labels.tolist()).values()) == {shots}
    assert set(Counter(splits.validation.labels.tolist()).values()) == {validation}
    assert task.describe()["examples"] == {"train": 3 * shots, "validation": 3 * validation, "test": 15}
    drawn = files(task)
    assert not set(drawn["train"]) & set(drawn["validation"])


def test_draws_follow_the_split_seed_and_fewer_are_among_more(clip: PretrainedModel, images: Path) -> None:
    few, more = files(make(clip, images, shots=2))["train"], files(make(clip, images, shots=5))["train"]
    assert set(few) < set(more)
    assert few == files(make(clip, images, shots=2))["train"]
    assert few != files(make(clip, images, shots=2, split_seed=1))["train"]
    assert files(make(clip, images, shots=2))["test"] == files(make(clip, images, split_seed=1))["test"]


def test_a_class_with_fewer_images_gives_what_it_has(clip: PretrainedModel, tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", {"train": 6, "val": 3, "test": 2})
    for i in range(4):
        (data / "train" / "b" / f"{i}.png").unlink()
    task = make(clip, data, shots=4)
    described = task.describe()
    assert described["examples"] == {"train": 10, "validation": 9, "test": 6}
    assert described["fewer_than_shots"] == {"train": {"b": 2}, "validation": {"a": 3, "b": 3, "c": 3}}


def test_without_a_test_set_one_is_held_out(clip: PretrainedModel, tmp_path: Path) -> None:
    task = make(clip, write_images(tmp_path / "images", {"train": 10}), shots=3)
    assert task.describe()["examples"] == {"train": 9, "validation": 9, "test": 6}
    drawn = files(task)
    assert len({path for part in drawn.values() for path in part}) == 24


def test_label_noise(clip: PretrainedModel, images: Path) -> None:
    clean, noisy = make(clip, images, shots=8).splits(0), make(clip, images, shots=8, label_noise=0.5)
    assert int((clean.train.labels != noisy.splits(0).train.labels).sum()) == 12
    assert torch.equal(clean.validation.labels, noisy.splits(0).validation.labels)


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


# -- learning ---------------------------------------------------------------------------------------------


def test_every_method_trains_is_saved_and_measured(clip: PretrainedModel, tmp_path: Path) -> None:
    """A class is a colour: an adapter of either kind and full fine-tuning get every test image right."""
    content = {
        "name": "colours",
        "task": {
            "name": "clip_classification",
            "dataset": "eurosat",
            "data": str(write_split(tmp_path / "eurosat")),
            "shots": 4,
        },
        "model": {"name_or_path": clip.name_or_path},
        "adapter": {"r": 4, "alpha": 16},
        "methods": [
            {"name": "full_ft", "train": {"lr": 3e-3}},
            "lora",
            {"name": "flat_lora", "optimizer": {"name": "flat_lora", "rho": 0.01}},
            {"name": "eflat_lora", "optimizer": {"name": "eflat_lora", "rho": 0.01}},
        ],
        "seeds": [0],
        "train": {"epochs": 25, "batch_size": 6, "lr": 3e-2, "threads": 1, "log_every": 1},
        "measures": [
            {"name": "hessian", "examples": 6, "max_iterations": 3},
            {"name": "hessian", "label": "gauss_newton", "matrix": "gauss_newton", "examples": 6,
             "max_iterations": 3},
            {"name": "sam_sharpness", "examples": 6},
            {"name": "slice", "points": 3, "directions": 1, "examples": 7},
            "cost",
        ],
    }  # fmt: skip
    results = store.StudyFolder(tmp_path / "results", "colours")
    for run in Plan(Study(content, "colours.yaml"), results).final([]):
        directory = results.run(run.id)
        directory.prepare(run.spec())
        assert runner.finish(directory.path) == "done", (directory.path / "failure.json").read_text()
        losses = store.history_of(directory)["loss"].dropna()
        assert losses.iloc[-1] < losses.iloc[0]
        result = directory.result()
        assert result is not None
        assert result["metrics"]["test"]["accuracy"] == 1, run.method
        measured = directory.measures()
        assert measured["hessian_merged"]["values"]["eigenvalue_1"] != 0
        assert measured["gauss_newton"]["values"]["eigenvalue_1"] >= 0
        assert measured["slice_merged"]["values"]["loss"] > 0
        assert measured["cost"]["values"]
        assert set(measured) == {*run.measures}


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
    assert "split_zhou_EuroSAT.json: cannot be read as JSON" in message
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
