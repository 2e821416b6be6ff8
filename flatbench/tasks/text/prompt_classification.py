"""Few-shot classification by prompts: a masked language model fills in a word that stands for a class."""

from __future__ import annotations

import functools
import hashlib
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, DataCollatorWithPadding

from flatbench.config.registry import LATER
from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.tasks.base import Batch, Example, Splits
from flatbench.tasks.common import few_shots
from flatbench.tasks.common.draws import Draw, drawn_by
from flatbench.tasks.common.hub import Source
from flatbench.tasks.common.pretrained_task import PretrainedTask
from flatbench.tasks.common.repeats import repeated_texts
from flatbench.tasks.common.splitting import stratified
from flatbench.tasks.common.token_cache import Tokenised, tokenised
from flatbench.tasks.text import prompt_data
from flatbench.tasks.text.sequence_classification import Encoded, Rows


class PromptClassification(PretrainedTask):
    """Few-shot classification by prompts: a masked language model puts a label word where the mask is.

    The logits of a class are those of its word at the mask; the loss is the cross-entropy over the classes'
    words (Gao et al. 2021, arXiv 2012.15723). No weights are new.

    ``train`` has up to ``shots`` examples of each class and ``validation`` up to as many more, drawn from the
    training file as MeZO's generator draws them (`few_shots.draw`): a class with fewer gives what it has, and
    is recorded. ``test`` is the published test set (SNLI, SST-5, TREC) or development set (SST-2, MNLI
    matched, RTE), or a stratified part of it.

    Args:
        model: the masked language model.
        task: sst2, sst5, snli, mnli, rte or trec.
        data: a folder of the published files (SST-2, MNLI, RTE in GLUE's layout; SNLI 1.0's JSON lines;
            SST-5 as train.csv and test.csv of ``label,sentence``; TREC's .label files), or a name on the hub.
        revision: branch, tag or commit of a data set on the hub; for TREC the copy in Parquet if None.
        columns: which column is ``text``, ``text_pair`` or ``label``, where it is not called as usual.
        shots: examples of each class in train, and as many in validation, as far as there are any.
        test_examples: size of ``test``, at most; all if None.
        template: the prompt, with {mask}, {a} and, for pairs, {b}; LM-BFF's if None.
        label_words: a word a class, in the order of the classes; LM-BFF's if None. A word is one token.
        max_length: tokens of a prompt; of longer ones the longer text is cut, and they are counted.
        split_seed: decides which examples are taken.
        join: how a text enters the prompt: ``plain`` as it is, ``mezo`` as in MeZO's code (Malladi et al.
            2023, arXiv 2305.17333): of a pair, the first loses its last character, the full stop before the
            template's question mark, and the second begins in lower case.
        draw: ``run_seed`` draws train and validation anew for every run's seed, as MeZO's and BAR's
            experiments do; test stays that of ``split_seed``, and so do the sizes and cut texts that are
            recorded.

    Raises:
        InputError: a template without its mask or a text, or with an unknown field; too few words.
    """

    metric = "accuracy"

    def __init__(
        self,
        *,
        model: PretrainedModel,
        task: Literal["sst2", "sst5", "snli", "mnli", "rte", "trec"],
        data: PathText | None = None,
        revision: str | None = None,
        columns: Annotated[dict[str, str] | None, LATER] = None,
        shots: Annotated[int, Field(ge=1)] = 512,
        test_examples: Annotated[int, Field(ge=1)] | None = 1000,
        template: str | None = None,
        label_words: list[str] | None = None,
        max_length: Annotated[int, Field(ge=8)] = 256,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        join: Annotated[Literal["plain", "mezo"], LATER] = "plain",
        draw: Annotated[Draw, LATER] = "split_seed",
    ) -> None:
        self.model, self.task, self.data, self.revision = model, task, data, revision
        self.columns = columns
        self.shots, self.test_examples = shots, test_examples
        self.max_length, self.split_seed = max_length, split_seed
        self.join, self.draw = join, draw
        published = prompt_data.DATA[task]
        self.labels = published.labels
        self.template = published.template if template is None else template
        self.label_words = list(published.words if label_words is None else label_words)
        _check_template(self.template, pair="{b}" in published.template)
        if len(self.label_words) != len(self.labels):
            raise InputError(
                f"label_words: {len(self.label_words)} words for {len(self.labels)} classes "
                f"({', '.join(self.labels)})"
            )

    # -- data ---------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Rows]:
        return prompt_data.read(self.task, self.data, self.revision, self.columns)

    @functools.cached_property
    def parts(self) -> Mapping[str, Rows]:
        """The splits. Raises InputError where a class has no example, or none is left for validation."""
        files = self._read()
        train, test = files["train"], files["test"]
        chosen = few_shots.draw(train.labels, self.labels, self.shots, self.split_seed)
        size = None if self.test_examples is None else min(self.test_examples, len(test))
        strata = [int(label) for label in test.labels]
        kept, _ = stratified(np.arange(len(test)), size, strata, self.split_seed, "test_examples")
        parts = {name: train.take(indices) for name, indices in chosen.items()}
        return {**parts, "test": test.take(kept.tolist())}

    def source(self) -> Source:
        """Where the data come from, told by the options alone."""
        return prompt_data.source(self.task, self.data, self.revision, self.columns)

    def fingerprint(self) -> str:
        """Digest of the files, of every split, and of the model's weights and tokenizer."""
        limit = pretrained.longest_input(self._config)
        if limit is not None and self.max_length > limit:
            raise InputError(f"max_length: {self.max_length} is more than the model's {limit} positions")
        pretrained.check_vocabulary(self.model, self._config, self._tokenizer)
        _ = self.parts, self.word_ids, self._encodings  # what is wrong with any of them is found now
        digest = hashlib.sha256()
        for name, rows in (*self._read().items(), *self.parts.items()):
            digest.update(f"{name}:{rows.digest}\n".encode())
        digest.update(pretrained.fingerprint(self.model, self._config).encode())
        return digest.hexdigest()

    def splits(self, seed: int) -> Splits:
        """The same for every seed, unless the run's seed draws train and validation."""
        if self.draw == "run_seed":
            parts = drawn_by(self, seed, ("parts", "_encodings")).parts
            found = {name: self._encode(parts[name], name) for name in ("train", "validation")}
        else:
            found = self._encodings
        return Splits(found["train"], found["validation"], self._encodings["test"])

    def shortages(self) -> Mapping[str, Mapping[str, int]]:
        """Classes with fewer examples than shots."""
        parts = {name: self.parts[name].labels for name in ("train", "validation")}
        return few_shots.short(parts, self.labels, dict.fromkeys(parts, self.shots))

    def overview(self) -> dict[str, Any]:
        """Size of each split, and examples that are in two splits."""
        return {
            "examples": {name: len(rows) for name, rows in self.parts.items()},
            **repeated_texts({name: rows.texts for name, rows in self.parts.items()}),
        }

    def describe(self) -> dict[str, Any]:
        """Beside `overview`, cut examples of each split, classes short of shots, rows without a label."""
        encoded = self._encodings.items()
        return {
            **self.overview(),
            "truncated": {name: part.truncated for name, part in encoded},
            "max_length": self.max_length,
            "fewer_than_shots": self.shortages(),
            "unlabelled_rows": sum(rows.incomplete for rows in self._read().values()),
        }

    @functools.cached_property
    def _encodings(self) -> dict[str, Encoded]:
        return {name: self._encode(rows, name) for name, rows in self.parts.items()}

    def _encode(self, rows: Rows, split: str) -> Encoded:
        content = ["prompt", rows.digest, self.template, self.max_length]
        content += [] if self.join == "plain" else [self.join]
        found = tokenised(self._tokenizer, content, len(rows), lambda: self._tokenise(rows, split))
        return Encoded(found[0], torch.tensor(rows.labels, dtype=torch.int64), truncated=found[1])

    def _tokenise(self, rows: Rows, split: str) -> Tokenised:
        features, truncated = [], 0
        for i, texts in enumerate(rows.texts):
            example, whole = self._prompt(self._join(texts), f"{split}, example {i + 1}")
            masks = [
                j for j, token in enumerate(example["input_ids"]) if token == self._tokenizer.mask_token_id
            ]
            if len(masks) != 1:
                raise InputError(
                    f"{split}, example {i + 1}: its text holds {self._tokenizer.mask_token} itself"
                )
            features.append({**example, "mask_positions": masks[0]})
            truncated += not whole
        return features, truncated

    def _join(self, texts: Sequence[str]) -> list[str]:
        """The texts as the template takes them."""
        if self.join == "plain" or len(texts) == 1:
            return list(texts)
        first, second = texts
        return [first[:-1], second[:1].lower() + second[1:]]

    def _prompt(self, texts: list[str], where: str) -> tuple[dict[str, Any], bool]:
        """The tokenised prompt, and whether its texts are whole; the longer one loses its end first."""
        whole = True
        while True:
            filled = self.template.format(
                mask=self._tokenizer.mask_token, **dict(zip("ab", texts, strict=False))
            )
            example = dict(self._tokenizer(filled, verbose=False))
            excess = len(example["input_ids"]) - self.max_length
            if excess <= 0:
                return example, whole
            spans = [
                self._tokenizer(t, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
                for t in texts
            ]
            longest = max(range(len(texts)), key=lambda i: len(spans[i]["input_ids"]))
            offsets = spans[longest]["offset_mapping"]
            if len(offsets) < 2:
                raise InputError(
                    f"max_length: {where}: {self.max_length} tokens leave no room for a text beside the "
                    "template"
                )
            shorter = max((len(s["input_ids"]) for i, s in enumerate(spans) if i != longest), default=0)
            cut = max(1, min(excess, len(offsets) - shorter, len(offsets) - 1))
            texts[longest] = texts[longest][: offsets[-cut - 1][1]]
            whole = False

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Tokens of each prompt."""
        return [len(example["input_ids"]) for example in examples]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Token ids and masks ``(N, longest)``, padded on the right; mask positions, labels ``(N,)``."""
        return dict(DataCollatorWithPadding(self._tokenizer)([dict(example) for example in examples]))

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of examples whose most likely word is the label's."""
        return {"accuracy": float((logits.argmax(-1) == labels).double().mean())}

    # -- model --------------------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy over the classes' words at the mask, and the words' logits ``(N, classes)``."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "mask_positions")}
        logits = model(**inputs).logits
        rows = torch.arange(len(logits), device=logits.device)
        chosen = logits[rows, batch["mask_positions"]][:, self.word_ids]
        return nn.functional.cross_entropy(chosen, batch["labels"]), chosen

    @functools.cached_property
    def word_ids(self) -> list[int]:
        """The label words' tokens. Raises InputError for a word that is not one token of its own."""
        found: list[int] = []
        for word in self.label_words:
            # within a text, where most tokenizers write a word with the space before it
            tokens = self._tokenizer(f" {word.strip()}", add_special_tokens=False)["input_ids"]
            if len(tokens) != 1 or tokens[0] == self._tokenizer.unk_token_id:
                pieces = " ".join(self._tokenizer.convert_ids_to_tokens(tokens))
                raise InputError(f"label_words: '{word}' is not one token of this model, but {pieces}")
            if tokens[0] in found:
                raise InputError(f"label_words: '{word}' is the same token as another class's word")
            found += tokens
        return found

    @functools.cached_property
    def _tokenizer(self) -> Any:
        loaded = pretrained.tokenizer(self.model)
        if loaded.mask_token is None:
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: its tokenizer has no mask token; "
                "prompts need a masked language model"
            )
        return loaded

    def _load(self, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        return pretrained.load(self.model, AutoModelForMaskedLM, self._config, seed)


def _check_template(template: str, pair: bool) -> None:
    wanted = ["a", "b", "mask"] if pair else ["a", "mask"]
    try:
        named = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise InputError(f"template: {template!r}: {error}") from None
    for field in wanted:
        if named.count(field) != 1:
            raise InputError(
                f"template: {template!r}: {{{field}}} must stand in it once, not {named.count(field)} times"
            )
    unknown = [field for field in named if field not in wanted]
    if unknown:
        fields = ", ".join(f"{{{field}}}" for field in wanted)
        raise InputError(f"template: {template!r}: unknown field {{{unknown[0]}}}; fields: {fields}")
