"""A user's own texts: a CSV, TSV, JSON-lines or parquet file with named columns is a task, in YAML alone."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import Field
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from flatbench.config.registry import LATER
from flatbench.errors import InputError
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.store.files import known_digest
from flatbench.tasks.common import columns as cells
from flatbench.tasks.common.frames import read_frame
from flatbench.tasks.common.hub import mapped
from flatbench.tasks.common.splitting import divide
from flatbench.tasks.text.sequence_classification import Rows, SequenceClassification, correlations


class TextClassification(SequenceClassification):
    """Your own texts: one or two columns of a CSV, TSV, JSON-lines or parquet file, and a column of labels.

    Where no file for validation or test is named, a part of the training file is held out for it, stratified
    by label: a tenth and a fifth, at most 1,000, unless sizes say else.

    Args:
        model: the encoder: any transformers model with a sequence classification head.
        train: the file to train on, ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet``.
        validation, test: further files with the same columns.
        text_columns: the column of the text, or the two of a pair of texts.
        label_column: the column of the label.
        columns: the same as ``{text: …, label: …}``, of pairs with ``text_pair`` too.
        score: the label is a number to predict, not a class; the main metric is then Pearson's correlation.
        labels: the classes in their order; those of the training file, sorted, if None.
        max_length: tokens per example, special ones included; longer ones are cut, and counted.
        train_examples, validation_examples, test_examples: sizes of the splits; all that there are if None.
        split_seed: decides which example is in which split.
        label_noise: share of the training labels that are replaced by another class, uniformly drawn; which
            ones depends on the run's seed. Validation and test labels are clean.

    Raises:
        InputError: classes named for a score, or label noise on one.
    """

    def __init__(
        self,
        *,
        model: PretrainedModel,
        train: Annotated[PathText, Field(min_length=1)],
        validation: PathText | None = None,
        test: PathText | None = None,
        text_columns: Annotated[list[str], Field(min_length=1, max_length=2)] = ["text"],  # noqa: B006 - not changed
        label_column: str = "label",
        columns: Annotated[dict[str, str] | None, LATER] = None,
        score: bool = False,
        labels: Annotated[list[str], Field(min_length=2)] | None = None,
        max_length: Annotated[int, Field(ge=8)] = 128,
        train_examples: Annotated[int, Field(ge=1)] | None = None,
        validation_examples: Annotated[int, Field(ge=1)] | None = None,
        test_examples: Annotated[int, Field(ge=1)] | None = None,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        self.files = {"train": train, "validation": validation, "test": test}
        texts, label_column = _column_names(text_columns, label_column, columns)
        self.text_columns, self.label_column, self.score = texts, label_column, score
        self.sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self.split_seed = split_seed
        self.metric = "pearson" if score else "accuracy"
        if score and (labels or label_noise):
            raise InputError("score: a number to predict has neither classes nor label noise")
        if twice := [name for name, count in Counter(labels or ()).items() if count > 1]:
            raise InputError(f"labels: '{twice[0]}' is named twice")
        self._label_names = labels
        super().__init__(model=model, max_length=max_length, label_noise=label_noise)

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the classes in the order of their numbers; none for a score."""
        if self.score:
            return ()
        if self._label_names:
            return tuple(self._label_names)
        frame = self._frames["train"]
        found = tuple(sorted({cells.as_text(value) for value in frame[self.label_column]} - {""}))
        if len(found) < 2:
            raise InputError(
                f"{self.files['train']}: column '{self.label_column}' holds {len(found)} classes; "
                "at least two are needed"
            )
        if len(found) > 1000:
            raise InputError(
                f"{self.files['train']}: column '{self.label_column}' holds {len(found)} different labels; "
                "if they are numbers to predict, say score: true"
            )
        return found

    @functools.cached_property
    def _frames(self) -> dict[str, pd.DataFrame]:
        wanted = [*self.text_columns, self.label_column]
        return {split: read_frame(split, name, wanted) for split, name in self.files.items() if name}

    @functools.cached_property
    def parts(self) -> Mapping[str, Rows]:
        """The splits. Raises InputError for files that cannot be used and sizes that cannot be had."""
        found = {split: self._rows(split, frame) for split, frame in self._frames.items()}
        strata = {split: [0 if self.score else int(x) for x in rows.labels] for split, rows in found.items()}
        divided = divide(strata, self.sizes, self.split_seed)
        return {part: found[source].take(chosen.tolist()) for part, (source, chosen) in divided.items()}

    def _rows(self, split: str, frame: pd.DataFrame) -> Rows:
        name = self.files[split]
        texts, labels = [], []
        own = [frame[column] for column in (*self.text_columns, self.label_column)]
        for number, (*row, label) in enumerate(zip(*own, strict=True), start=1):
            for column, value in zip(self.text_columns, row, strict=True):
                cells.text(value, f"{name}, row {number}: column '{column}'")
            texts.append(tuple(row))
            labels.append(self._label(label, f"{name}, row {number}: column '{self.label_column}'"))
        return Rows(tuple(texts), tuple(labels))

    def _label(self, value: Any, where: str) -> float:
        return cells.score(value, where) if self.score else cells.class_number(value, self._numbers, where)

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    def source_digest(self) -> str:
        """Digest of the files' contents."""
        _ = self._frames
        files = [f"{split}:{known_digest(Path(n).expanduser())}" for split, n in self.files.items() if n]
        return hashlib.sha256("\n".join(files).encode()).hexdigest()

    @property
    def validation_metrics(self) -> Sequence[str]:
        """The main metric and the other one."""
        return (self.metric, "spearman" if self.score else "macro_f1")

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy and macro F1, or Pearson's and Spearman's correlation for a score."""
        truth = labels.numpy()
        if self.score:
            return correlations(logits, truth)
        guess = logits.argmax(-1).numpy()
        return {
            "accuracy": float(accuracy_score(truth, guess)),
            "macro_f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        }


def _column_names(texts: Sequence[str], label: str, named: Mapping[str, str] | None) -> tuple[list[str], str]:
    """Text columns and label column. Raises InputError for ``columns`` for anything else, or a lone pair."""
    usual = dict(zip(("text", "text_pair"), [*texts, ""], strict=False))
    found = dict(mapped({**usual, "label": label}, named))
    return [found[role] for role in ("text", "text_pair") if found.get(role)], found["label"]
