"""Image classification with any transformers vision model: an image folder, IDX files, or the hub's data."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from flatbench.config.registry import LATER
from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.tasks.base import Example, Splits
from flatbench.tasks.common.hub import Source
from flatbench.tasks.common.noise import noisy_labels
from flatbench.tasks.common.pretrained_task import PretrainedTask
from flatbench.tasks.common.repeats import repeats
from flatbench.tasks.common.splitting import divide
from flatbench.tasks.images import image_data
from flatbench.tasks.images.image_data import Pictures, image_columns

#: pairs of names of linear layers that LoRA adapts in vision models: query and value, or ConvNeXt's MLP
TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("qkv",), ("pwconv1", "pwconv2"))
#: prepared images are kept up to this many bytes a split
KEPT_BYTES = 2**30


class Prepared(Sequence[Example]):
    """Images as the model takes them, prepared when first asked for.

    Attributes:
        labels: ``(N,)`` int64.
    """

    def __init__(self, pictures: Pictures, indices: Sequence[int], labels: Tensor, processor: Any) -> None:
        self.pictures, self.indices, self.labels, self.processor = pictures, indices, labels, processor
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return {"pixel_values": self._pixels(int(index)), "labels": self.labels[index]}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def _pixels(self, index: int) -> Tensor:
        if index not in self._cache:
            image = self.pictures.image(self.indices[index])
            pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
            if (len(self._cache) + 1) * pixels.numel() * 4 > KEPT_BYTES:
                return pixels
            self._cache[index] = pixels
        return self._cache[index]

    def relabelled(self, labels: Tensor) -> Prepared:
        """The same images, prepared once for all, with other labels."""
        other = Prepared(self.pictures, self.indices, labels, self.processor)
        other._cache = self._cache
        return other


class ImageClassification(PretrainedTask):
    """Image classification: any transformers vision model on an image folder, IDX files or the hub's data.

    ``data`` is one of: a folder with ``train/CLASS/*.png`` (and ``validation/…``, ``test/…``) or with
    ``CLASS/*.png``; a folder of IDX files as MNIST and Fashion-MNIST are published
    (``train-images-idx3-ubyte.gz``, …); a name on the hub. Where there is no validation set, a part of the
    training images is held out for it, stratified by class; the same where there is no test set.

    Args:
        model: the vision model, with its image processor.
        data: the images, as above.
        configuration, revision: of a data set on the hub.
        image_column, label_column: of a data set on the hub; or ``columns: {image: …, label: …}``.
        train_examples: size of ``train``; all that are left if None.
        validation_examples: size of ``validation``; a tenth of the training images, at most 1,000, if None.
        test_examples: size of ``test``; all of it if None, or a fifth of the training images, at most 1,000.
        split_seed: decides which image is in which split.
        label_noise: share of the training labels that are replaced by another class, uniformly drawn; which
            ones depends on the run's seed. Validation and test labels are clean.
    """

    metric = "accuracy"
    takes_text = False
    _new_modules = pretrained.new_modules  # the head

    def __init__(
        self,
        *,
        model: PretrainedModel,
        data: Annotated[PathText, Field(min_length=1)],
        configuration: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        columns: Annotated[dict[str, str] | None, LATER] = None,
        train_examples: Annotated[int, Field(ge=1)] | None = None,
        validation_examples: Annotated[int, Field(ge=1)] | None = None,
        test_examples: Annotated[int, Field(ge=1)] | None = None,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        self.model, self.data = model, data
        self.source_options = (
            data,
            configuration,
            revision,
            *image_columns(image_column, label_column, columns),
        )
        self.sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self.split_seed, self.label_noise = split_seed, label_noise

    # -- data ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _labels_and_pictures(self) -> tuple[tuple[str, ...], dict[str, Pictures]]:
        return image_data.read(*self.source_options)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their numbers. Raises InputError for unusable data."""
        return self._labels_and_pictures[0]

    @functools.cached_property
    def parts(self) -> dict[str, tuple[Pictures, list[int]]]:
        """Split -> images and which of them. Raises InputError for sizes that cannot be had."""
        found = self._labels_and_pictures[1]
        divided = divide({k: v.labels for k, v in found.items()}, self.sizes, self.split_seed)
        return {part: (found[source], chosen.tolist()) for part, (source, chosen) in divided.items()}

    def source(self) -> Source:
        """Where the data come from, told by the options alone."""
        return image_data.source(*self.source_options)

    def fingerprint(self) -> str:
        """Digest of every split's images and labels, and of the model's weights and processor."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for pictures, indices in self.parts.values():
            pictures.check(indices)
        _ = self._processor_fits
        for name, (pictures, indices) in self.parts.items():
            digest.update(f"{name}:{pictures.digest(indices)}\n".encode())
        digest.update(pretrained.fingerprint(self.model, self._config).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _datasets(self) -> dict[str, Prepared]:
        return {
            name: Prepared(
                pictures, indices, torch.tensor([pictures.labels[i] for i in indices]), self._processor
            )
            for name, (pictures, indices) in self.parts.items()
        }

    def splits(self, seed: int) -> Splits:
        """Train with label noise from ``seed``; everything else clean and the same for every seed."""
        found = self._datasets
        train = found["train"]
        if self.label_noise:
            train = train.relabelled(noisy_labels(train.labels, self.label_noise, len(self.classes), seed))
        return Splits(train, found["validation"], found["test"])

    def overview(self) -> dict[str, Any]:
        """Size of each split, the classes, and images that are in two splits."""
        sizes = {name: len(indices) for name, (_, indices) in self.parts.items()}
        contents = {name: map(pictures.content, indices) for name, (pictures, indices) in self.parts.items()}
        others = pretrained.head_of_others(self._config, self.classes)
        return {
            "examples": sizes,
            "classes": list(self.classes),
            **({"head_of_others": others} if others else {}),
            **repeats(contents),
        }

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Images ``(N, channels, height, width)`` and labels ``(N,)``."""
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of images whose largest logit is the label's."""
        return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}

    # -- model --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _processor(self) -> Any:
        return pretrained.processor(self.model, AutoImageProcessor, "image processor")

    @functools.cached_property
    def _processor_fits(self) -> bool:
        """True; raises InputError if the processor makes images that the model does not take."""
        pictures, indices = self.parts["train"]
        made = self._processor(pictures.image(indices[0]), return_tensors="pt").get("pixel_values")
        shape = "none" if made is None else tuple(made.shape[1:])
        try:
            if made is None:
                raise ValueError("there are no pixel_values")
            with pretrained.shapes_only():  # the model's own check, without its weights
                model, _ = self._load(0)
            model(pixel_values=made.to("meta"))
        except NotImplementedError:
            pass  # a model that needs its values; the first step will tell
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: its image processor makes images of shape "
                f"{shape}, which the model does not take ({' '.join(str(error).split())[:200]}); they do not "
                "belong together"
            ) from error
        return True

    @functools.cached_property
    def target_modules(self) -> Sequence[str]:  # type: ignore[override]
        """Query and value, or ConvNeXt's linear layers. Raises InputError for a model without linear ones."""
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(self._config)
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        for names in TARGETS:
            if set(names) <= linear:
                return names
        raise InputError(
            f"adapter.target_modules: no layers to adapt are known in a model of type "
            f"'{self._config.model_type}'; its linear ones are {', '.join(sorted(linear)) or 'none'}"
        )

    def _load(self, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        config = copy.deepcopy(self._config)
        return pretrained.load_classifier(
            self.model, AutoModelForImageClassification, config, self.classes, seed
        )
