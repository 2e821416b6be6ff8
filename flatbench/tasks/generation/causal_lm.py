"""Text generation: a language model learns to answer prompts, and what it generates is scored."""

from __future__ import annotations

import functools
import hashlib
import inspect
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from flatbench.config.registry import LATER, Options
from flatbench.errors import InputError
from flatbench.labels import IGNORED, count_terms
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.seeding import derive_seed
from flatbench.tasks.base import Batch, Example, Splits
from flatbench.tasks.common import generating, token_loss, tokenising
from flatbench.tasks.common.hub import Source
from flatbench.tasks.common.pretrained_task import PretrainedTask
from flatbench.tasks.common.repeats import repeated_texts
from flatbench.tasks.common.token_cache import Tokenised, tokenised
from flatbench.tasks.common.token_loss import evaluating, padded
from flatbench.tasks.generation import data as generation_data
from flatbench.tasks.generation import metrics as generation_metrics
from flatbench.tasks.generation.data import Pairs

MetricName = Literal["bleu", "nist", "meteor", "rouge_l", "cider", "exact_match"]

#: what the papers' tables show
DEFAULT_METRICS: dict[str, list[MetricName]] = {
    "e2e": ["bleu", "nist", "meteor", "rouge_l", "cider"],
    "gsm8k": ["exact_match"],
}


class Generation(Options):
    """The ``generation:`` section: how test texts are generated and scored.

    Attributes:
        beams: width of the beam search; 1 is greedy. The LoRA paper's E2E setting is 10.
        max_new_tokens: tokens generated at most.
        length_penalty, no_repeat_ngram_size: transformers' own.
        metrics: the main one first; those of the data set's papers if not given.
    """

    beams: Annotated[int, Field(ge=1)] = 1
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    length_penalty: float = 1.0
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    metrics: Annotated[list[MetricName], Field(min_length=1)] | None = None


class Sequences(Sequence[Example]):
    """Tokenised pairs.

    Attributes:
        rows: per pair ``input_ids``, ``labels`` and its whole ``prompt`` as lists; the first two make up an
            example.
        prompts: per source its prompt's tokens and its references, for generation.
        truncated: pairs of which the end was cut off.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        prompts: Sequence[tuple[list[int], list[str]]],
        truncated: int,
    ) -> None:
        self.rows, self.prompts, self.truncated = rows, prompts, truncated

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return {name: row[name] for name in ("input_ids", "labels")}

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


class CausalLM(PretrainedTask):
    """Text generation: E2E descriptions or GSM8K answers by any causal or encoder-decoder language model.

    The loss is the mean over the tokens of the reference and its end mark; prompt and padding have none.
    Every split has that loss and ``log_likelihood`` (its negative), on which hyper-parameters are chosen;
    texts are generated for the test split of final runs only, one a source, and scored against all of its
    references.

    E2E has published training, development and test files, which are the splits. GSM8K has no development
    file: validation is held out of its training file.

    Args:
        model: the language model.
        dataset: e2e or gsm8k.
        data: a folder of the published files (plain or gzipped), or a name on the hub; the usual one if None.
        revision: branch, tag or commit of a data set on the hub; for E2E the copy in Parquet if None.
        columns: which column is ``mr`` or ``ref``, ``question`` or ``answer``, where it is not called so.
        prompt: template of the prompt, with the data set's fields: {mr} or {linearised} (the meaning as
            ``name : Alimentum | Type : pub``, as the LoRA paper's data files have it), or {question}.
        max_length: tokens of prompt and reference together (of each, for an encoder-decoder); what is longer
            loses its end, and is counted.
        padding_side: where a batch's shorter texts are padded.
        train_examples: pairs in ``train``; all if None.
        validation_examples, test_examples: sources in ``validation`` and ``test``, each with all of its
            references; all if None (GSM8K's validation: a tenth of the training file, at most 500).
        split_seed: decides which are taken.
        label_smoothing: share of the target that is spread over the whole vocabulary, in training alone:
            what is evaluated and measured is the loss without it.
        generation: how test texts are generated; None generates nothing, and ``log_likelihood`` is the main
            metric.

    Raises:
        InputError: a template with an unknown field or without any; metrics whose packages are missing.
    """

    tuning_metric = "log_likelihood"

    def __init__(
        self,
        *,
        model: PretrainedModel,
        dataset: Literal["e2e", "gsm8k"],
        data: PathText | None = None,
        revision: str | None = None,
        columns: Annotated[dict[str, str] | None, LATER] = None,
        prompt: str | None = None,
        max_length: Annotated[int, Field(ge=8)] = 512,
        padding_side: Literal["left", "right"] = "right",
        train_examples: Annotated[int, Field(ge=1)] | None = None,
        validation_examples: Annotated[int, Field(ge=1)] | None = None,
        test_examples: Annotated[int, Field(ge=1)] | None = None,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        generation: Generation | None = Generation(),  # noqa: B008 - frozen
        label_smoothing: Annotated[float, Field(ge=0, lt=1), LATER] = 0.0,
    ) -> None:
        self.model, self.dataset, self.data, self.revision = model, dataset, data, revision
        self.max_length, self.padding_side, self.split_seed = max_length, padding_side, split_seed
        self.sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self.generation, self.label_smoothing, self.columns = generation, label_smoothing, columns
        self.published = source = generation_data.SOURCES[dataset]
        self.prompt = source.prompt if prompt is None else prompt
        _check_template(self.prompt, [*source.fields, *source.derived])
        self.metric_names: list[MetricName] = []
        if generation is not None:
            self.metric_names = generation.metrics or DEFAULT_METRICS[dataset]
            generation_metrics.check(self.metric_names)
        self.metric = self.metric_names[0] if self.metric_names else "log_likelihood"

    # -- data ---------------------------------------------------------------------------------------------

    @functools.cached_property
    def parts(self) -> dict[str, Pairs]:
        """The splits' rows. Raises InputError for files that cannot be used and sizes that cannot be had."""
        files = dict(generation_data.read(self.dataset, self.data, self.revision, self.columns))
        sizes, seed = self.sizes, self.split_seed
        if "validation" in files:
            files["validation"], _ = _sources(files["validation"], sizes["validation"], seed, "validation")
        else:
            size = sizes["validation"] or min(len(files["train"]) // 10, 500)
            files["validation"], files["train"] = _sources(files["train"], size, seed, "validation")
        files["test"], _ = _sources(files["test"], sizes["test"], seed, "test")
        generation_metrics.check_references(self.metric_names, {k: v.references for k, v in files.items()})
        files["train"] = _rows(files["train"], sizes["train"], seed)
        return {name: files[name] for name in ("train", "validation", "test")}

    def source(self) -> Source:
        """Where the data come from, told by the options alone."""
        return generation_data.source_of(self.dataset, self.data, self.revision, self.columns)

    def fingerprint(self) -> str:
        """Digest of the files, of every split, and of the model's weights and tokenizer."""
        limit = pretrained.longest_input(self._config)
        if limit is not None and self.max_length > limit:
            raise InputError(f"max_length: {self.max_length} is more than the model's {limit} positions")
        pretrained.check_vocabulary(self.model, self._config, self._tokenizer)
        files = generation_data.read(self.dataset, self.data, self.revision, self.columns)
        digest = hashlib.sha256()
        for name, rows in (*files.items(), *self.parts.items()):
            digest.update(f"{name}:{rows.digest}\n".encode())
        digest.update(pretrained.fingerprint(self.model, self._config).encode())
        digest.update(tokenising.name_of_prompts(self._tokenizer, goes_on=not self._two_sided))
        _ = self._sequences  # a prompt too long for its reference is found now, not in the midst of a run
        return digest.hexdigest()

    def splits(self, seed: int) -> Splits:
        """The published splits, the same for every seed."""
        parts = self._sequences
        return Splits(parts["train"], parts["validation"], parts["test"])

    def overview(self) -> dict[str, Any]:
        """Pairs of each split, and those whose source is in another one as well."""
        return {
            "examples": {name: len(pairs) for name, pairs in self.parts.items()},
            **repeated_texts({name: pairs.sources for name, pairs in self.parts.items()}),
        }

    def describe(self) -> dict[str, Any]:
        """Beside `overview`, sources and cut pairs of each split."""
        encoded = self._sequences.items()
        return {
            **self.overview(),
            "sources": {name: len(part.prompts) for name, part in encoded},
            "truncated": {name: part.truncated for name, part in encoded},
            "max_length": self.max_length,
        }

    @functools.cached_property
    def _sequences(self) -> dict[str, Sequences]:
        return {name: self._encode(pairs, name) for name, pairs in self.parts.items()}

    def _encode(self, pairs: Pairs, split: str) -> Sequences:
        content = ["pairs", pairs.digest, self.prompt, self.max_length, self._two_sided]
        rows, truncated = tokenised(
            self._tokenizer, content, len(pairs), lambda: self._tokenise(pairs, split)
        )
        by_source: dict[tuple[str, ...], tuple[list[int], list[str]]] = {}
        for source, row, reference in zip(pairs.sources, rows, pairs.references, strict=True):
            by_source.setdefault(source, (row["prompt"], []))[1].append(reference)
        return Sequences(rows, list(by_source.values()), truncated)

    def _tokenise(self, pairs: Pairs, split: str) -> Tokenised:
        texts = [self.prompt.format(**self.published.values(fields)) for fields in pairs.fields]
        prompts = tokenising.tokenise_prompts(self._tokenizer, texts, goes_on=not self._two_sided)
        # decoders see the reference go on from the prompt: a space, and no mark of a new beginning
        references = [text if self._two_sided else f" {text}" for text in pairs.references]
        targets = self._tokenizer(references, add_special_tokens=False, verbose=False)["input_ids"]
        examples, truncated = [], 0
        for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            example, whole = self._example(prompt, [*target, self._tokenizer.eos_token_id])
            if all(label == IGNORED for label in example["labels"]):
                raise InputError(
                    f"max_length: a prompt of {split} (pair {i + 1}) has {len(prompt)} tokens and leaves "
                    f"no room for its reference within {self.max_length}"
                )
            examples.append({**example, "prompt": prompt})
            truncated += not whole
        return examples, truncated

    def _example(self, prompt: list[int], target: list[int]) -> tuple[dict[str, list[int]], bool]:
        """The model's input and labels, and whether nothing was cut off."""
        if self._two_sided:
            whole = max(len(prompt), len(target)) <= self.max_length
            return {"input_ids": prompt[: self.max_length], "labels": target[: self.max_length]}, whole
        tokens = [*prompt, *target]
        labels = [*[IGNORED] * len(prompt), *target]
        whole = len(tokens) <= self.max_length
        return {"input_ids": tokens[: self.max_length], "labels": labels[: self.max_length]}, whole

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Tokens of each pair: a decoder's input holds the reference, an encoder-decoder's does not."""
        apart = ("input_ids", "labels") if self._two_sided else ("input_ids",)
        return [sum(len(example[name]) for name in apart) for example in examples]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Token ids, mask and labels ``(N, longest)``; positions too where padding would shift them."""
        left = self.padding_side == "left"
        pad = self._tokenizer.pad_token_id
        ids = padded([e["input_ids"] for e in examples], pad, left)
        mask = padded([[1] * len(e["input_ids"]) for e in examples], 0, left)
        batch = {"input_ids": ids, "attention_mask": mask}
        if left and self._takes_positions:
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        # a decoder's labels stand at its input's tokens; an encoder-decoder's stand by themselves
        batch["labels"] = padded([e["labels"] for e in examples], IGNORED, left and not self._two_sided)
        return batch

    # -- model --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tokenizer(self) -> Any:
        loaded = pretrained.tokenizer(self.model)
        if loaded.eos_token_id is None:
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: its tokenizer has no end-of-sequence "
                "token, so generation would not know where to stop"
            )
        return loaded

    @property
    def _two_sided(self) -> bool:
        return bool(self._config.is_encoder_decoder)

    @property
    def _takes_positions(self) -> bool:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self._config), None)
        return kind is not None and "position_ids" in inspect.signature(kind.forward).parameters

    def _load(self, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        kind = AutoModelForSeq2SeqLM if self._two_sided else AutoModelForCausalLM
        return pretrained.load(self.model, kind, self._config, seed)

    # -- loss and metrics ---------------------------------------------------------------------------------

    def terms(self, batch: Batch) -> int:
        """Tokens that the loss is the mean of."""
        return count_terms(batch["labels"], shifted=not self._two_sided)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss over the `terms` of a batch; smoothed while the model is in training mode."""
        if not (self.label_smoothing and model.training):
            return super().loss(model, batch)
        kept = ("labels",) if self._two_sided else ()  # whose decoder makes its inputs of them
        inputs = {key: value for key, value in batch.items() if key != "labels" or key in kept}
        return token_loss.smoothed(
            model(**inputs).logits, batch["labels"], self.label_smoothing, shifted=not self._two_sided
        )

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of reference tokens that are the most likely one, from the model's logits and labels."""
        return token_loss.token_accuracy(*token_loss.in_place(logits, labels, shifted=not self._two_sided))

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """``loss`` (mean over reference tokens), ``log_likelihood``, ``token_accuracy``."""
        return token_loss.evaluate(model, batches, self.outputs, shifted=not self._two_sided)

    def test_metrics(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """The scores of generated texts; none where the study generates nothing."""
        if self.generation is None or not isinstance(examples, Sequences):
            return {}
        outputs = self.generate(model, [prompt for prompt, _ in examples.prompts], batch_size)
        return generation_metrics.score(self.metric_names, outputs, [r for _, r in examples.prompts])

    def generate(self, model: nn.Module, prompts: Sequence[list[int]], batch_size: int) -> list[str]:
        """A text for each prompt, by the study's beam search, in evaluation mode."""
        options = self.generation or Generation()
        device = next(model.parameters()).device
        generator: Any = model
        texts = []
        longest = 0 if self._two_sided else max(map(len, prompts), default=0)
        count = generating.room_for(options.max_new_tokens, longest, self._config)
        with evaluating(model), torch.no_grad(), generating.as_told(model):
            for start in range(0, len(prompts), batch_size):
                part = list(prompts[start : start + batch_size])
                ids = padded(part, self._tokenizer.pad_token_id, left=True).to(device)
                mask = padded([[1] * len(prompt) for prompt in part], 0, left=True).to(device)
                found = generator.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    num_beams=options.beams,
                    max_new_tokens=count,
                    length_penalty=options.length_penalty,
                    no_repeat_ngram_size=options.no_repeat_ngram_size,
                    eos_token_id=self._tokenizer.eos_token_id,
                    pad_token_id=self._tokenizer.pad_token_id,
                )
                new = found if self._two_sided else found[:, ids.shape[1] :]
                texts += [t.strip() for t in self._tokenizer.batch_decode(new, skip_special_tokens=True)]
        return texts


def _check_template(template: str, fields: Sequence[str]) -> None:
    try:
        named = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise InputError(f"prompt: {template!r}: {error}") from None
    unknown = [field for field in named if field not in fields]
    if unknown or not named:
        wrong = f"unknown field {{{unknown[0]}}}" if unknown else "no field, so every prompt is the same"
        raise InputError(f"prompt: {template!r}: {wrong}; fields: {', '.join(fields)}")


def _sources(pairs: Pairs, size: int | None, seed: int, split: str) -> tuple[Pairs, Pairs]:
    """The pairs of ``size`` sources drawn at random, in their order, and the pairs of the others."""
    known = list(dict.fromkeys(pairs.sources))
    if size is None:
        return pairs, pairs.take([])
    if size > len(known):
        raise InputError(f"{split}_examples: {size} asked for, but only {len(known)} sources are there")
    order = np.random.default_rng(derive_seed(seed, "split", split)).permutation(len(known))
    chosen = {known[i] for i in order[:size]}
    inside = [source in chosen for source in pairs.sources]
    return (
        pairs.take([i for i, taken in enumerate(inside) if taken]),
        pairs.take([i for i, taken in enumerate(inside) if not taken]),
    )


def _rows(pairs: Pairs, size: int | None, seed: int) -> Pairs:
    if not len(pairs):
        raise InputError("train_examples: nothing is left to train on; make validation_examples smaller")
    if size is None:
        return pairs
    if size > len(pairs):
        raise InputError(f"train_examples: {size} asked for, but only {len(pairs)} pairs are there")
    order = np.random.default_rng(derive_seed(seed, "split", "train")).permutation(len(pairs))
    return pairs.take(sorted(order[:size].tolist()))
