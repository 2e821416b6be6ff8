"""Few-shot image classification with CLIP: a class is a prompt, and an adapter sits on both encoders."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoImageProcessor

from flatbench.config import sources
from flatbench.config.registry import LATER
from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.tasks.base import Example, Splits, Task
from flatbench.tasks.common.draws import Draw, drawn_by
from flatbench.tasks.common.hub import Source
from flatbench.tasks.common.noise import noisy_labels
from flatbench.tasks.common.repeats import repeats
from flatbench.tasks.images import clip_data, image_data
from flatbench.tasks.images.augmented import Augmented
from flatbench.tasks.images.clip_model import PromptedCLIP
from flatbench.tasks.images.image_classification import Prepared
from flatbench.tasks.images.image_data import image_columns

TEMPLATE = "a photo of a {}."
#: eos_token_id in the configurations of early CLIPs, whose text ends at its largest token id instead
LEGACY_END = 2


class ClipClassification(Task):
    """Few-shot classification with CLIP: an image against the prompts of the classes, both encoders trained.

    The logits are ``exp(logit_scale) · cos(image, prompt)`` and the loss their cross-entropy, as in CLIP-LoRA
    (Zanella & Ben Ayed 2024, arXiv 2405.18541). No weights are new.

    ``data`` with a ``dataset`` is the folder that CoOp calls ``$DATA``, or the data set's own folder in it:
    ``eurosat/split_zhou_EuroSAT.json`` beside the images in ``eurosat/2750``, and so on. With a
    ``split_file`` of the same layout it is the folder of the images. With neither it is what
    `image_classification` takes: a folder with one subfolder a class, IDX files, or a name on the hub.

    Args:
        model: a CLIP with its image processor and tokenizer.
        data: the images, as above.
        dataset: one of the five data sets of CLIP-LoRA's few-shot study that the paper uses.
        split_file: JSON ``{"train": [[image, label, class name], …], "val": …, "test": …}``.
        configuration, revision, image_column, label_column: of a data set on the hub.
        columns: the columns as ``{image: …, label: …}``, the same.
        class_names: what the prompts call the classes, in the order of their numbers; the data's names, with
            spaces for ``_``, if None.
        template: the prompt, with ``{}`` where the name stands; the usual one of ``dataset``, or
            "a photo of a {}.", if None.
        shots: images of each class in train; a class that has fewer gives what it has, and is recorded.
        validation_shots: the same for validation; as many as shots, but at most 4, if None.
        test_examples: size of ``test``, at most; all if None. Where there is no test set, a fifth of the
            training images, at most 1,000.
        split_seed: decides which images are taken. Fewer shots are among more.
        label_noise: share of the training labels that are replaced by another class, uniformly drawn; which
            ones depends on the run's seed. Validation and test labels are clean.
        augment: train on random crops (torchvision's RandomResizedCrop: .08 to 1 of the area) that are
            mirrored half of the time, as CLIP-LoRA does; measures see the whole images.
        refill: a class with fewer images than shots repeats them up to that number, as CLIP-LoRA does.
        draw: ``run_seed`` draws train and validation anew for every run's seed, as CLIP-LoRA does; test stays
            that of ``split_seed``.

    Raises:
        InputError: a template without one ``{}``, or ``dataset`` and ``split_file`` at once.
    """

    metric = "accuracy"
    target_modules = ("q_proj", "k_proj", "v_proj")

    def __init__(
        self,
        *,
        model: PretrainedModel,
        data: Annotated[PathText, Field(min_length=1)],
        dataset: Literal["eurosat", "oxford_pets", "oxford_flowers", "caltech101", "dtd"] | None = None,
        split_file: PathText | None = None,
        configuration: str | None = None,
        revision: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        columns: Annotated[dict[str, str] | None, LATER] = None,
        class_names: Annotated[list[str], Field(min_length=2)] | None = None,
        template: str | None = None,
        shots: Annotated[int, Field(ge=1)] = 16,
        validation_shots: Annotated[int, Field(ge=1)] | None = None,
        test_examples: Annotated[int, Field(ge=1)] | None = None,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0,
        augment: Annotated[bool, LATER] = False,
        refill: Annotated[bool, LATER] = False,
        draw: Annotated[Draw, LATER] = "split_seed",
    ) -> None:
        if dataset and split_file:
            raise InputError(f"split_file: {dataset} has its own; leave out one of dataset and split_file")
        self.model, self.data, self.dataset, self.split_file = model, data, dataset, split_file
        own = image_columns(image_column, label_column, columns)
        self.source_options = (data, configuration, revision, *own)
        self.class_names = class_names
        usual = clip_data.DATA[dataset].template if dataset else TEMPLATE
        self.template = usual if template is None else template
        if self.template.count("{}") != 1:
            raise InputError(
                f"template: {self.template!r}: {{}}, the class's name, must stand in it once, not "
                f"{self.template.count('{}')} times"
            )
        self.shots, self.test_examples = shots, test_examples
        self.validation_shots = min(shots, 4) if validation_shots is None else validation_shots
        self.split_seed, self.label_noise = split_seed, label_noise
        self.augment, self.refill, self.draw = augment, refill, draw

    # -- data ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def _source_data(self) -> clip_data.Source:
        if self.dataset:
            return clip_data.read(self.dataset, self.data)
        if self.split_file:
            return clip_data.read_split(Path(self.split_file).expanduser(), Path(self.data).expanduser())
        return image_data.read(*self.source_options)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes as the prompts have them. Raises InputError for unusable data."""
        found = self._source_data[0]
        if self.class_names is None:
            return tuple(name.replace("_", " ") for name in found)
        if len(self.class_names) != len(found):
            raise InputError(
                f"class_names: {len(self.class_names)} names for {len(found)} classes "
                f"({', '.join(found)[:200]})"
            )
        return tuple(self.class_names)

    @functools.cached_property
    def _draw(self) -> clip_data.Drawn:
        return clip_data.draw(
            self.classes,
            self._source_data[1],
            self.shots,
            self.validation_shots,
            self.test_examples,
            self.split_seed,
            self.refill,
        )

    def source(self) -> Source:
        """Where the data come from, told by the options alone."""
        if self.dataset or self.split_file:
            return Source(sources.FILES.get(self.dataset or ""), None, ())
        return image_data.source(*self.source_options)

    def fingerprint(self) -> str:
        """Digest of every split's images and labels, of the prompts, and of the model and its processor."""
        digest = hashlib.sha256(repr(self.prompts).encode())
        _ = self._tokens  # prompts or a processor that do not fit the model are found now
        self._check_processor()
        for name, (pictures, indices) in self._draw.parts.items():
            pictures.check(indices)
            digest.update(f"{name}:{pictures.digest(indices)}\n".encode())
        if self.draw == "run_seed":  # of which any image may come
            for name in ("train", "validation"):
                pictures = self._draw.parts[name][0]
                digest.update(f"all of {name}:{pictures.digest(range(len(pictures)))}\n".encode())
        digest.update(pretrained.fingerprint(self.model, self._config).encode())
        return digest.hexdigest()

    @functools.cached_property
    def _datasets(self) -> dict[str, Prepared]:
        return {
            name: Prepared(
                pictures, indices, torch.tensor([pictures.labels[i] for i in indices]), self._processor
            )
            for name, (pictures, indices) in self._draw.parts.items()
        }

    def splits(self, seed: int) -> Splits:
        """Train with label noise from ``seed``; everything else clean and, unless drawn by it, the same."""
        found = self._datasets
        if self.draw == "run_seed":
            found = {**drawn_by(self, seed, ("_draw", "_datasets"))._datasets, "test": found["test"]}
        train = found["train"]
        if self.label_noise:
            train = train.relabelled(noisy_labels(train.labels, self.label_noise, len(self.classes), seed))
        return Splits(train, found["validation"], found["test"])

    def shortages(self) -> Mapping[str, Mapping[str, int]]:
        """Classes with fewer images than shots."""
        return self._draw.short

    def overview(self) -> dict[str, Any]:
        """Size of each split, and images that are in two splits."""
        return {
            "examples": {name: len(indices) for name, (_, indices) in self._draw.parts.items()},
            **repeats({name: map(p.content, indices) for name, (p, indices) in self._draw.parts.items()}),
        }

    def describe(self) -> dict[str, Any]:
        """Beside `overview`, prompts, how many were cut, and the classes with fewer images than shots."""
        return {
            **self.overview(),
            "prompts": list(self.prompts),
            "truncated_prompts": self._tokens[1],
            "fewer_than_shots": self.shortages(),
        }

    def training_examples(self, examples: Sequence[Example], seed: int) -> Sequence[Example]:
        """The images themselves, or random crops of them."""
        if not self.augment:
            return examples
        assert isinstance(examples, Prepared)
        return Augmented(examples, self._config.vision_config.image_size, seed)

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Images ``(N, channels, height, width)`` and labels ``(N,)``."""
        return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of images whose nearest prompt is the label's."""
        return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}

    # -- prompts ------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> tuple[str, ...]:
        """The classes' prompts in the order of their numbers."""
        return tuple(self.template.replace("{}", name) for name in self.classes)

    @functools.cached_property
    def _tokens(self) -> tuple[dict[str, Tensor], int]:
        """Tokenised prompts, padded to the longest, and how many were cut to what the model can take."""
        text = self._config.text_config
        pretrained.check_vocabulary(self.model, self._config, self._tokenizer)
        limit = text.max_position_embeddings
        whole = self._tokenizer(list(self.prompts), verbose=False)["input_ids"]
        found = self._tokenizer(
            list(self.prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        first: dict[tuple[int, ...], int] = {}
        for number, row in enumerate(found["input_ids"].tolist()):
            other = first.setdefault(tuple(row), number)
            if other != number:
                raise InputError(
                    f"class_names: '{self.classes[other]}' and '{self.classes[number]}' have the same prompt "
                    "for this model; name the classes apart"
                )
            # the model reads a text at its end mark, and at its first token, without a word, if there is none
            end = max(row) if text.eos_token_id == LEGACY_END else text.eos_token_id
            if end != self._tokenizer.eos_token_id or end not in row:
                raise InputError(
                    f"model.name_or_path: {self.model.name_or_path}: its tokenizer does not end a text with "
                    "the token that the model looks for; they do not belong together"
                )
        tokens = {key: found[key] for key in ("input_ids", "attention_mask")}
        return tokens, sum(len(row) > limit for row in whole)

    # -- model --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _config(self) -> Any:
        found = pretrained.config(self.model)
        if found.model_type != "clip":
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: a model of type '{found.model_type}', and "
                "no CLIP with a text and an image encoder ('clip')"
            )
        return found

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return pretrained.tokenizer(self.model)

    @functools.cached_property
    def _processor(self) -> Any:
        return pretrained.processor(self.model, AutoImageProcessor, "image processor")

    def _check_processor(self) -> None:
        """Raise InputError if the processor makes images that the model does not take."""
        pictures, indices = self._draw.parts["train"]
        made = self._processor(pictures.image(indices[0]), return_tensors="pt").get("pixel_values")
        vision = self._config.vision_config
        wanted = (vision.num_channels, vision.image_size, vision.image_size)
        if made is None or tuple(made.shape[1:]) != wanted:
            shape = "none" if made is None else tuple(made.shape[1:])
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: its image processor makes images of shape "
                f"{shape}, but the model takes {wanted}; they do not belong together"
            )

    def build_model(self, seed: int) -> nn.Module:
        """The pretrained CLIP with the classes' prompts. Raises InputError if weights are missing."""
        model, info = pretrained.load(self.model, PromptedCLIP, self._config, seed)
        missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
        if missing:
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: its files are no whole CLIP; they lack "
                f"{len(missing)} weights, as {missing[0]}"
            )
        assert isinstance(model, PromptedCLIP)
        return model.prompted(**self._tokens[0])
