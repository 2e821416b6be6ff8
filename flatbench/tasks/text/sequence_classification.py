"""Base of tasks on transformers' sequence classifiers: one or two texts in, a class or a score out."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.base import Example, Splits
from flatbench.tasks.common.noise import noisy_labels
from flatbench.tasks.common.pretrained_task import PretrainedTask
from flatbench.tasks.common.repeats import repeated_texts
from flatbench.tasks.common.token_cache import Tokenised, tokenised
from flatbench.tasks.common.tokenising import tokenise


@dataclass(frozen=True)
class Rows:
    """Texts and their labels.

    Attributes:
        texts: per row one text, or two.
        labels: class numbers, or scores.
        incomplete: rows of the source that were left out because a text is missing.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: tuple[float, ...]
    incomplete: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(tuple(self.texts[i] for i in indices), tuple(self.labels[i] for i in indices))

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of texts and labels."""
        found = hashlib.sha256()
        for texts, label in zip(self.texts, self.labels, strict=True):
            found.update(repr((texts, float(label))).encode())
        return found.hexdigest()


class Encoded(Sequence[Example]):
    """Tokenised texts with their labels.

    Attributes:
        features: per example the tokenizer's output (``input_ids``, ``attention_mask``, …) as lists.
        labels: ``(N,)``, classes as int64 or scores as float32.
        truncated: examples of which a part was cut off.
    """

    def __init__(self, features: Sequence[Mapping[str, Any]], labels: Tensor, truncated: int) -> None:
        self.features, self.labels, self.truncated = features, labels, truncated

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        return {**self.features[index], "labels": self.labels[index].item()}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


class SequenceClassification(PretrainedTask):
    """A transformers sequence classifier on texts: the part of such tasks that does not depend on the data.

    Texts are tokenised once per task object, large sets once for all (`token_cache`); a batch is padded on
    the right to its longest text.

    Args:
        model: the encoder.
        max_length: tokens per example, special ones included; longer ones are cut, and counted.
        label_noise: share of the training labels that are replaced by another class.

    Raises:
        InputError: label noise for a score.
    """

    #: names of the classes in the order of their numbers; empty where the label is a score
    labels: tuple[str, ...] = ()
    _new_modules = pretrained.new_modules  # the head

    def __init__(self, *, model: PretrainedModel, max_length: int, label_noise: float) -> None:
        self.model, self.max_length, self.label_noise = model, max_length, label_noise
        if label_noise and not self.labels:
            raise InputError("label_noise: only classes can be replaced, and this task's label is a score")

    @functools.cached_property
    @abstractmethod
    def parts(self) -> Mapping[str, Rows]:
        """``train``, ``validation``, ``test`` and further test sets by name. Raises InputError."""

    @abstractmethod
    def source_digest(self) -> str:
        """Hex digest of all data that `parts` were made from. Raises InputError if it is missing."""

    def fingerprint(self) -> str:
        """Digest of the source, of every part, and of the encoder's weights and tokenizer."""
        self._check_model()
        digest = hashlib.sha256(self.source_digest().encode())
        for name, rows in self.parts.items():
            digest.update(f"{name}:{rows.digest}\n".encode())
        digest.update(pretrained.fingerprint(self.model, self._config).encode())
        return digest.hexdigest()

    def _check_model(self) -> None:
        limit = pretrained.longest_input(self._config)
        if limit is not None and self.max_length > limit:
            raise InputError(f"max_length: {self.max_length} is more than the model's {limit} positions")
        pretrained.check_vocabulary(self.model, self._config, self._tokenizer)

    @functools.cached_property
    def _encodings(self) -> dict[str, Encoded]:
        return {name: self._encode(rows) for name, rows in self.parts.items()}

    def _encode(self, rows: Rows) -> Encoded:
        content = ["sequence", rows.digest, self.max_length]
        found = tokenised(self._tokenizer, content, len(rows), lambda: self._tokenise(rows))
        labels = torch.tensor(rows.labels, dtype=torch.int64 if self.labels else torch.float32)
        return Encoded(found[0], labels, truncated=found[1])

    def _tokenise(self, rows: Rows) -> Tokenised:
        return tokenise(self._tokenizer, list(zip(*rows.texts, strict=True)), self.max_length)

    def splits(self, seed: int) -> Splits:
        """Train with label noise from ``seed``; everything else clean and the same for every seed."""
        found = dict(self._encodings)
        train = found.pop("train")
        if self.label_noise:
            noisy = noisy_labels(train.labels, self.label_noise, len(self.labels), seed)
            train = Encoded(train.features, noisy, train.truncated)
        return Splits(train, found.pop("validation"), found.pop("test"), more_tests=found)

    def overview(self) -> dict[str, Any]:
        """Size of each part, the classes, and examples that are in two parts."""
        others = pretrained.head_of_others(self._config, self.labels)
        return {
            "examples": {name: len(rows) for name, rows in self.parts.items()},
            **({"classes": list(self.labels)} if self.labels else {}),
            **({"head_of_others": others} if others else {}),
            **repeated_texts({name: rows.texts for name, rows in self.parts.items()}),
        }

    def describe(self) -> dict[str, Any]:
        """Beside `overview`, the number of truncated examples of each part."""
        return {
            **self.overview(),
            "truncated": {name: part.truncated for name, part in self._encodings.items()},
            "max_length": self.max_length,
        }

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Tokens of each text, special ones included."""
        return [len(example["input_ids"]) for example in examples]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Token ids and masks ``(N, longest)``, padded on the right, and labels ``(N,)``."""
        return dict(DataCollatorWithPadding(self._tokenizer)([dict(example) for example in examples]))

    def _load(self, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        config, kind = copy.deepcopy(self._config), AutoModelForSequenceClassification
        for part in (config, config.get_text_config()):
            if getattr(part, "pad_token_id", None) is None:
                part.pad_token_id = self._tokenizer.pad_token_id
        if self.labels:
            return pretrained.load_classifier(self.model, kind, config, self.labels, seed)
        config.num_labels, config.problem_type = 1, "regression"
        return pretrained.load(self.model, kind, config, seed)


def correlations(predicted: Tensor, truth: NDArray[np.float64]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; NaN where either side is constant.

    Args:
        predicted: ``(N,)`` or ``(N, 1)``; constant where they differ by no more than their type's rounding.
    """
    scores = predicted.double().reshape(-1).numpy()
    rounding = 16 * torch.finfo(predicted.dtype).eps * float(np.abs(scores).max(initial=0.0))
    if float(np.ptp(scores)) <= rounding:
        return {"pearson": math.nan, "spearman": math.nan}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        warnings.simplefilter("ignore", NearConstantInputWarning)
        return {
            "pearson": float(pearsonr(scores, truth).statistic),
            "spearman": float(spearmanr(scores, truth).statistic),
        }
