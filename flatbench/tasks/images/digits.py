"""scikit-learn's handwritten digits: a small real problem that needs no network."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from flatbench.config.registry import Options
from flatbench.errors import InputError
from flatbench.machine.cache import folder as cache_folder
from flatbench.seeding import derive_seed
from flatbench.tasks.base import Example, Splits, Task
from flatbench.tasks.common.noise import noisy_labels

CLASSES = 10
PRETRAIN_CLASSES = 5
#: raised when pretraining would give another backbone from the same options
BACKBONE_FORMAT = 1


class DigitsModel(Options):
    """The ``model:`` section of digits: a ViT on 8x8 images, pretrained on the digits 0-4."""

    hidden_size: Annotated[int, Field(ge=4)] = 64
    layers: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 4
    patch_size: Annotated[int, Field(ge=1, le=8)] = 2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pretrain_epochs: Annotated[int, Field(ge=0)] = 30
    pretrain_lr: Annotated[float, Field(gt=0)] = 1e-3


class Images(Sequence[Example]):
    """Images and labels as two tensors; an example is a view of a row."""

    def __init__(self, pixel_values: Tensor, labels: Tensor) -> None:
        self.pixel_values, self.labels = pixel_values, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


class Digits(Task):
    """Handwritten digits (scikit-learn): a ViT pretrained on 0-4 learns all ten from noisy labels.

    The 1,797 images are divided once, stratified, by ``split_seed``: test, validation, train, and the rest,
    whose digits 0-4 are what the backbone is pretrained on. No image that is trained, validated or tested
    on was seen in pretraining.

    Args:
        model: shape and pretraining of the backbone.
        label_noise: share of the training labels that are replaced by another digit, uniformly drawn from
            the nine; which ones depends on the run's seed. Validation and test labels are clean.
        train_size, validation_size, test_size: images in each split.
        split_seed: decides which image is in which split, and the backbone's initial weights.

    Raises:
        InputError: sizes that leave nothing to pretrain on, a patch size that does not divide the image.
    """

    metric = "accuracy"
    target_modules = ("q_proj", "v_proj")
    modules_to_save = ("classifier",)

    def __init__(
        self,
        *,
        model: DigitsModel = DigitsModel(),  # noqa: B008 - frozen
        label_noise: Annotated[float, Field(ge=0, le=1)] = 0.2,
        train_size: Annotated[int, Field(ge=10)] = 400,
        validation_size: Annotated[int, Field(ge=10)] = 300,
        test_size: Annotated[int, Field(ge=10)] = 500,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
    ) -> None:
        self.model = model
        self.label_noise = label_noise
        self.sizes = {"test": test_size, "validation": validation_size, "train": train_size}
        self.split_seed = split_seed
        total, asked = len(_digits()[1]), sum(self.sizes.values())
        if asked > total - 100:
            raise InputError(
                f"train_size + validation_size + test_size: {asked} of {total} images leave fewer than "
                "100 to pretrain on; make one smaller"
            )
        if 8 % model.patch_size:
            raise InputError(f"model.patch_size: {model.patch_size} does not divide the image's 8 pixels")
        if model.hidden_size % model.heads:
            raise InputError(
                f"model.heads: {model.heads} does not divide model.hidden_size {model.hidden_size}"
            )

    @functools.cached_property
    def indices(self) -> dict[str, Tensor]:
        """Split -> indices of its images; ``pretrain`` holds the digits 0-4 of the rest."""
        labels = _digits()[1].numpy()
        rest = torch.arange(len(labels)).numpy()
        found = {}
        for name, size in self.sizes.items():
            chosen, rest = train_test_split(
                rest, train_size=size, stratify=labels[rest], random_state=self.split_seed
            )
            found[name] = torch.from_numpy(chosen)
        found["pretrain"] = torch.from_numpy(rest[labels[rest] < PRETRAIN_CLASSES])
        return found

    def fingerprint(self) -> str:
        """Digest of images, labels and which split each is in."""
        digest = hashlib.sha256()
        for tensor in (*_digits(), *(self.indices[name] for name in sorted(self.indices))):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def splits(self, seed: int) -> Splits:
        """Train with label noise from ``seed``; validation and test clean."""
        images, labels = _digits()
        parts = {name: Images(images[i], labels[i].clone()) for name, i in self.indices.items()}
        parts["train"].labels = noisy_labels(parts["train"].labels, self.label_noise, CLASSES, seed)
        return Splits(parts["train"], parts["validation"], parts["test"])

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Images ``(N, 1, 8, 8)`` in [-1, 1] and labels ``(N,)``."""
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of images whose largest logit is the label's."""
        return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained backbone with a new head for ten digits."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "initialisation"))
            model = self._vit(CLASSES)
        own = model.state_dict()
        weights = self._backbone(own)
        model.load_state_dict({**own, **weights})
        return model

    def _vit(self, classes: int) -> nn.Module:
        model: nn.Module = ViTForImageClassification(
            ViTConfig(
                image_size=8,
                num_channels=1,
                patch_size=self.model.patch_size,
                hidden_size=self.model.hidden_size,
                intermediate_size=2 * self.model.hidden_size,
                num_hidden_layers=self.model.layers,
                num_attention_heads=self.model.heads,
                hidden_dropout_prob=self.model.dropout,
                attention_probs_dropout_prob=self.model.dropout,
                num_labels=classes,
            )
        )
        return model

    # -- pretraining --------------------------------------------------------------------------------------

    def _backbone(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights of everything below the head, from the cache or made now."""
        path = cache_folder() / f"digits-{self._backbone_key(names)}.safetensors"
        try:
            return load_file(path)
        except (OSError, SafetensorError):  # not there yet, or damaged: made anew
            weights = self._pretrain()
        with contextlib.suppress(OSError, SafetensorError):  # no room for a cache: made again next time
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                temporary = Path(folder) / "weights"
                save_file(weights, temporary)
                os.replace(temporary, path)
        return weights

    def _backbone_key(self, names: Iterable[str]) -> str:
        parts = [
            BACKBONE_FORMAT,
            torch.__version__,
            self.fingerprint(),
            self.split_seed,
            self.model.model_dump(),
            sorted(names),  # another version of transformers may call its parameters otherwise
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _pretrain(self) -> dict[str, Tensor]:
        images, labels = _digits()
        chosen = self.indices["pretrain"]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that the number of threads does not decide the backbone's last bits
        try:
            with torch.random.fork_rng():
                torch.manual_seed(derive_seed(self.split_seed, "pretraining"))
                model = self._vit(PRETRAIN_CLASSES)
                self._fit(model, images[chosen], labels[chosen])
        finally:
            torch.set_num_threads(threads)
        state = model.state_dict()
        return {name: tensor.clone() for name, tensor in state.items() if not name.startswith("classifier")}

    def _fit(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 32) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.model.pretrain_lr, weight_decay=0.05)
        steps = self.model.pretrain_epochs * -(-len(labels) // batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(steps, 1))
        for _ in range(self.model.pretrain_epochs):
            for batch in torch.randperm(len(labels)).split(batch_size):
                optimizer.zero_grad()
                model(pixel_values=images[batch], labels=labels[batch]).loss.backward()
                optimizer.step()
                schedule.step()


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)`` in [-1, 1] and labels ``(1797,)``."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(bunch.target)
