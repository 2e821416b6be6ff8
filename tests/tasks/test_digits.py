"""The digits task: its splits, label noise, and pretrained backbone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from flatbench.errors import InputError
from flatbench.tasks.images import digits
from flatbench.tasks.images.digits import Digits, DigitsModel

SMALL = DigitsModel(hidden_size=8, layers=1, heads=2, pretrain_epochs=1)


def test_sizes_and_images() -> None:
    splits = Digits().splits(0)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [400, 300, 500]
    image = splits.train[0]["pixel_values"]
    assert image.shape == (1, 8, 8)
    assert float(image.min()) >= -1
    assert float(image.max()) <= 1


def test_no_image_is_in_two_places() -> None:
    indices = Digits().indices
    everything = torch.cat(list(indices.values())).tolist()
    assert len(everything) == len(set(everything))
    labels = digits._digits()[1]
    assert set(labels[indices["pretrain"]].tolist()) == {0, 1, 2, 3, 4}


def test_splits_are_stratified() -> None:
    splits = Digits(label_noise=0.0).splits(0)
    for part in (splits.train, splits.validation, splits.test):
        counts = Counter(part[i]["labels"].item() for i in range(len(part)))
        assert set(counts) == set(range(10))
        assert max(counts.values()) - min(counts.values()) <= 0.02 * len(part)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_label_noise(share: float) -> None:
    clean = Digits(label_noise=0.0).splits(0)
    noisy = Digits(label_noise=share).splits(0)
    wrong = clean.train.labels != noisy.train.labels
    assert int(wrong.sum()) == round(share * 400)
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert set(noisy.train.labels.tolist()) <= set(range(10))


def test_more_noise_only_adds_wrong_labels() -> None:
    clean, less, more = (Digits(label_noise=s).splits(5).train.labels for s in (0.0, 0.1, 0.3))
    wrong = less != clean
    assert torch.equal(less[wrong], more[wrong])


def test_noise_depends_on_the_seed() -> None:
    task = Digits()
    assert not torch.equal(task.splits(0).train.labels, task.splits(1).train.labels)


def test_backbone_is_kept_and_made_anew_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATBENCH_CACHE", str(tmp_path))
    first = Digits(model=SMALL).build_model(0).state_dict()
    [file] = tmp_path.iterdir()
    made = file.stat().st_mtime_ns
    Digits(model=SMALL).build_model(0)
    assert file.stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes()[:100])
    again = Digits(model=SMALL).build_model(0).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_backbone_of_other_names_is_not_taken() -> None:
    """transformers has renamed ViT's parameters between releases; a cache outlives them."""
    task = Digits(model=SMALL)
    names = list(task._vit(5).state_dict())
    renamed = [name.replace("q_proj", "query") for name in names]
    assert renamed != names
    assert task._backbone_key(names) == task._backbone_key(reversed(names))
    assert task._backbone_key(names) != task._backbone_key(renamed)


def test_backbone_is_shared_between_seeds_and_the_head_is_not() -> None:
    first, second = (Digits(model=SMALL).build_model(seed).state_dict() for seed in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]) is (name == "classifier.bias" or "classifier" not in name)


@pytest.mark.slow
def test_pretraining_learns() -> None:
    """The backbone tells the digits 0-4 apart, on which it was pretrained."""
    task = Digits()
    images, labels = digits._digits()
    seen = task.indices["pretrain"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task._vit(digits.PRETRAIN_CLASSES)
        task._fit(model, images[seen], labels[seen])
    with torch.no_grad():
        guess = model.eval()(pixel_values=images[seen]).logits.argmax(-1)
    assert float((guess == labels[seen]).double().mean()) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 900}, "train_size"),
        ({"model": DigitsModel(patch_size=3)}, "patch_size"),
        ({"model": DigitsModel(hidden_size=10, heads=4)}, "heads"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Digits(**options)
    assert "\n" not in str(caught.value)
