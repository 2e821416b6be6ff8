"""CLIP by class prompts: zero-shot logits, few-shot draws, learning."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer

from flatbench import store
from flatbench.config.sections import AdapterOptions
from flatbench.landscape.evaluation.evaluate import Evaluator
from flatbench.models import factors as lora
from flatbench.models.adapt import adapt
from flatbench.models.pretrained import PretrainedModel
from flatbench.runs.finish import finish
from flatbench.study import Study
from flatbench.study.plan import Plan
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from flatbench.training.trainer import fixed_batches
from tests.tasks.clip_cases import files, make, write_split
from tests.tasks.task_cases import clip_folder, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PretrainedModel:
    return PretrainedModel(name_or_path=str(clip_folder(tmp_path_factory.mktemp("models") / "clip")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", {"train": 12, "test": 5})


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
    model = adapt(task.build_model(0), AdapterOptions(r=2, alpha=1), task.target_modules, ())
    factors = lora.lora_factors(model)
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
    names = lora.adapted_modules(model, task.target_modules)
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


# -- learning ---------------------------------------------------------------------------------------------


@pytest.mark.slow
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
        assert finish(directory.path) == "done", (directory.path / "failure.json").read_text()
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
