"""GLUE: nine tasks on sentences and pairs of sentences, each with its own metric."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from flatbench.config.registry import LATER
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.tasks.common.hub import Source
from flatbench.tasks.common.splitting import divide
from flatbench.tasks.text import glue_data
from flatbench.tasks.text.sequence_classification import Rows, SequenceClassification, correlations

TaskName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]

#: the figure that the GLUE paper's and the LoRA paper's tables show
MAIN_METRIC = {"cola": "matthews", "stsb": "pearson"}


class Glue(SequenceClassification):
    """GLUE: any of its nine tasks with its own metric, from the hub or from a folder of its TSV files.

    GLUE's test labels are not public. So here ``test`` is the official development set (for MNLI the matched
    one; the mismatched one is a second test set, ``test_mismatched``), and ``validation``, on which
    hyper-parameters are chosen, is held out of the official training file, stratified by label (STS-B: by
    rounded score). ``train`` is the rest of that file or a stratified part of it. Published figures are
    often on the same development set that hyper-parameters were chosen on; these here are not.

    Metrics: Matthews correlation for CoLA, Pearson (main) and Spearman correlation for STS-B, accuracy (main)
    and F1 of class 1 for MRPC and QQP, accuracy else; accuracy for CoLA as well.

    Args:
        model: the encoder: any transformers model with a sequence classification head.
        task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.
        data: a folder in GLUE's own TSV layout (the task's, or the one above it), or a data set on the hub.
        revision: branch, tag or commit of a data set on the hub.
        columns: which column is ``text``, ``text_pair`` or ``label``, where it is not called as GLUE's.
        max_length: tokens per example, special ones included; longer ones are cut, and counted.
        train_examples: size of ``train``; all that are left if None.
        validation_examples: size of ``validation``; a tenth of the training file, at most 1,000, if None.
        test_examples: size of each test set; all if None.
        split_seed: decides which example is in which split.
        label_noise: share of the training labels that are replaced by another class, uniformly drawn; which
            ones depends on the run's seed. Validation and test labels are clean.

    Raises:
        InputError: label noise for STS-B, whose label is a score.
    """

    def __init__(
        self,
        *,
        model: PretrainedModel,
        task: TaskName,
        data: Annotated[PathText, Field(min_length=1)] = glue_data.HUB,
        revision: str | None = None,
        columns: Annotated[dict[str, str] | None, LATER] = None,
        max_length: Annotated[int, Field(ge=8)] = 128,
        train_examples: Annotated[int, Field(ge=1)] | None = None,
        validation_examples: Annotated[int, Field(ge=1)] | None = None,
        test_examples: Annotated[int, Field(ge=1)] | None = None,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        self.task, self.data, self.revision, self.columns = task, data, revision, columns
        self.sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self.split_seed = split_seed
        self.labels = glue_data.LAYOUTS[task].labels
        self.metric = MAIN_METRIC.get(task, "accuracy")
        super().__init__(model=model, max_length=max_length, label_noise=label_noise)

    @property
    def validation_metrics(self) -> Sequence[str]:
        """All metrics of the task."""
        more = {"cola": ["accuracy"], "stsb": ["spearman"], "mrpc": ["f1"], "qqp": ["f1"]}
        return [self.metric, *more.get(self.task, [])]

    def _read(self) -> dict[str, Rows]:
        return glue_data.read(self.task, self.data, self.revision, self.columns)

    def source(self) -> Source:
        """Where the data come from, told by the options alone."""
        return glue_data.source(self.task, self.data, self.revision, self.columns)

    def source_digest(self) -> str:
        """Digest of the rows of all files."""
        digest = hashlib.sha256()
        for split, rows in self._read().items():
            digest.update(f"{split}:{rows.digest}\n".encode())
        return digest.hexdigest()

    @functools.cached_property
    def parts(self) -> Mapping[str, Rows]:
        """The splits. Raises InputError for files that cannot be used and sizes that cannot be had."""
        files = self._read()
        strata = {name: [round(label) for label in rows.labels] for name, rows in files.items()}
        divided = divide(strata, self.sizes, self.split_seed)
        return {part: files[source].take(chosen.tolist()) for part, (source, chosen) in divided.items()}

    def describe(self) -> dict[str, Any]:
        """Sizes and truncated examples of each part, and rows of the files that were left out."""
        return {**super().describe(), "incomplete_rows": sum(r.incomplete for r in self._read().values())}

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """The task's metrics; NaN for a correlation with constant predictions.

        Args:
            logits: ``(N, classes)``, or ``(N, 1)`` for STS-B.
            labels: ``(N,)``.
        """
        truth = labels.numpy()
        if not self.labels:
            return correlations(logits, truth)
        guess = logits.argmax(-1).numpy()
        found = {"accuracy": float(accuracy_score(truth, guess))}
        if self.task == "cola":
            found["matthews"] = float(matthews_corrcoef(truth, guess))
        if self.task in ("mrpc", "qqp"):
            found["f1"] = float(f1_score(truth, guess, zero_division=0))
        return found
