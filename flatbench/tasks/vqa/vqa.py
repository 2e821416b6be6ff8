"""Questions about images: a model of images and text learns to answer, and what it generates is scored."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from flatbench.config.registry import LATER
from flatbench.errors import InputError
from flatbench.labels import count_terms
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.security.paths import PathText
from flatbench.seeding import derive_seed
from flatbench.tasks.base import Batch, Example, Splits
from flatbench.tasks.common import generating, token_loss
from flatbench.tasks.common.hub import Source
from flatbench.tasks.common.pretrained_task import PretrainedTask
from flatbench.tasks.common.repeats import repeats
from flatbench.tasks.common.token_loss import evaluating
from flatbench.tasks.common.tokenising import name_of_prompts
from flatbench.tasks.vqa import data as vqa_data
from flatbench.tasks.vqa import metrics as vqa_metrics
from flatbench.tasks.vqa import processor as vqa_processor
from flatbench.tasks.vqa.batches import Answers, Collator
from flatbench.tasks.vqa.data import Question, Questions
from flatbench.tasks.vqa.processor import Encoder

#: pairs of names of linear layers that LoRA adapts in language models: query and value
TARGETS = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",))
#: what VizWiz's annotators answer where an image does not tell
UNANSWERABLE = "unanswerable"
#: side of the white picture that shows which tensors a processor gives, in pixels
BLANK = 64

_INSTRUCTIONS = {
    "scienceqa": "Answer with the option's letter from the given choices directly.",
    "vizwiz": "When the provided information is insufficient, respond with 'unanswerable'. "
    "Answer the question using a single word or phrase.",
}
_NEW_TOKENS = {"scienceqa": 16, "vizwiz": 32}


class VQA(PretrainedTask):
    """Questions about images: ScienceQA or VizWiz by Qwen2.5-VL, LLaVA, SmolVLM and their like.

    The model is whatever AutoProcessor and AutoModelForImageTextToText load; code beside a model is never
    run, so that Qwen-VL-Chat, which transformers itself does not have, is refused. Where the processor has a
    chat template the question is a user's turn and the answer the assistant's; else the prompt is the image's
    token, the question and "Answer:". The loss is the mean over the tokens of the answer and its end mark;
    prompt, image and padding have none. Questions without a picture (half of ScienceQA's) are asked as text
    alone, in the same batches.

    Every split has that loss and ``log_likelihood`` (its negative), on which hyper-parameters are chosen;
    answers are generated, greedily, for the test split of final runs only. ScienceQA's ``accuracy`` is given
    by subject, grade, with and without image as well; a text that names no choice counts as wrong (LLaVA's
    rule; ScienceQA's first script drew a choice at random). VizWiz's is its own: matches with three of ten
    people, and how well unanswerable questions are told by the probability that the model gives to the answer
    "unanswerable".

    ScienceQA's published splits are the splits. The answers of VizWiz's test questions are not public: its
    published validation questions are ``test``, and ``validation`` is held out of its training questions.

    Args:
        model: the model with its processor.
        dataset: scienceqa or vizwiz.
        data: a folder of the published files (`vqa_data` says which), or of folders ``scienceqa`` and
            ``vizwiz``; or a name on the hub; for ScienceQA the usual one if None.
        revision: branch, tag or commit of a data set on the hub.
        columns: which column (or entry of a problem) is ``question``, ``choices``, ``answer``, ``hint``,
            ``answers`` or ``image``, where it is not called so.
        questions: all, or those with or without a picture only.
        image_size: pictures are made squares of so many pixels (448 for Qwen-VL) before the processor has
            them, which gives all of them the same number of tokens; None leaves that to the processor.
        instruction: the last line of every question; the data set's usual one if None.
        max_length: tokens of image, prompt and answer together. Of a longer text the context loses its end,
            then the question, and is counted; image, choices and answer are never cut.
        padding_side: where a batch's shorter texts are padded.
        train_examples, validation_examples, test_examples: sizes of the splits; all if None (VizWiz's
            validation: a tenth of the training questions, at most 500).
        split_seed: decides which are taken.
        max_new_tokens: tokens generated at most; 16 for ScienceQA and 32 for VizWiz if None.
    """

    metric = "accuracy"
    tuning_metric = "log_likelihood"

    def __init__(
        self,
        *,
        model: PretrainedModel,
        dataset: Literal["scienceqa", "vizwiz"],
        data: PathText | None = None,
        revision: str | None = None,
        columns: Annotated[dict[str, str] | None, LATER] = None,
        questions: Literal["all", "with_image", "without_image"] = "all",
        image_size: Annotated[int, Field(ge=1)] | None = None,
        instruction: str | None = None,
        max_length: Annotated[int, Field(ge=8)] = 1024,
        padding_side: Literal["left", "right"] = "right",
        train_examples: Annotated[int, Field(ge=1)] | None = None,
        validation_examples: Annotated[int, Field(ge=1)] | None = None,
        test_examples: Annotated[int, Field(ge=1)] | None = None,
        split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0,
        max_new_tokens: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        self.model, self.dataset = model, dataset
        self.source_options = (dataset, data, revision, columns)
        self.questions, self.image_size, self.max_length = questions, image_size, max_length
        self.instruction = _INSTRUCTIONS[dataset] if instruction is None else instruction
        self.padding_side, self.split_seed = padding_side, split_seed
        self.sizes = {"train": train_examples, "validation": validation_examples, "test": test_examples}
        self.max_new_tokens = max_new_tokens or _NEW_TOKENS[dataset]

    # -- data ---------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Questions]:
        """The splits' questions as the files are now."""
        found = {split: self._select(rows) for split, rows in vqa_data.read(*self.source_options).items()}
        sizes, seed = self.sizes, self.split_seed
        if "validation" in found:
            found["validation"], _ = _draw(found["validation"], sizes["validation"], seed, "validation")
        else:
            size = sizes["validation"] or max(1, min(len(found["train"]) // 10, 500))
            found["validation"], found["train"] = _draw(found["train"], size, seed, "validation")
        for split in ("train", "test"):
            found[split], _ = _draw(found[split], sizes[split], seed, split)
        return {split: found[split] for split in ("train", "validation", "test")}

    def _select(self, rows: Questions) -> Questions:
        if self.questions == "all":
            return rows
        return tuple(q for q in rows if (q.picture is not None) == (self.questions == "with_image"))

    @functools.cached_property
    def parts(self) -> dict[str, Questions]:
        """The splits' questions. Raises InputError for unusable files and sizes that cannot be had."""
        return self._read()

    def source(self) -> Source:
        """Where the data come from, told by the options alone."""
        return vqa_data.source(*self.source_options)

    def fingerprint(self) -> str:
        """Digest of every split's questions and pictures, and of the model's weights and processor."""
        encoder = self._encoder
        limit = pretrained.longest_input(self._config.get_text_config())
        if limit is not None and self.max_length > limit:
            raise InputError(f"max_length: {self.max_length} is more than the model's {limit} positions")
        _ = self._answers  # a picture that does not decode is found now, not in the midst of a run
        digest = hashlib.sha256()
        for name, questions in self._read().items():
            digest.update(f"{name}:{vqa_data.digest(questions)}\n".encode())
        digest.update(pretrained.fingerprint(self.model, self._config).encode())
        digest.update(name_of_prompts(encoder.tokenizer, goes_on=True))
        return digest.hexdigest()

    @functools.cached_property
    def _answers(self) -> dict[str, Answers]:
        return {name: self._encode(questions, name) for name, questions in self.parts.items()}

    def _encode(self, questions: Questions, split: str) -> Answers:
        encoded = []
        for q in questions:
            size = None
            if q.picture is not None:
                size = q.picture.size()
                size = size if self.image_size is None else (self.image_size, self.image_size)
            encoded.append(self._encoder.encode(q, size, f"{split} question {q.key}"))
        return Answers(questions, encoded, self._encoder)

    def splits(self, seed: int) -> Splits:
        """The published splits, the same for every seed."""
        parts = self._answers
        return Splits(parts["train"], parts["validation"], parts["test"])

    def overview(self) -> dict[str, Any]:
        """Questions of each split, and those that are in two splits."""
        return {
            "examples": {name: len(questions) for name, questions in self.parts.items()},
            **repeats({name: map(vqa_data.content, questions) for name, questions in self.parts.items()}),
        }

    def describe(self) -> dict[str, Any]:
        """Beside `overview`, questions with a picture and questions of which text was cut, of each split."""
        encoded = self._answers.items()
        return {
            **self.overview(),
            "with_image": {
                name: sum(q.picture is not None for q in part.questions) for name, part in encoded
            },
            "truncated": {name: sum(not e.whole for e in part.encoded) for name, part in encoded},
            "max_length": self.max_length,
        }

    def lengths(self, examples: Sequence[Example]) -> Sequence[int]:
        """Tokens of each question with its picture's places and its answer; no picture is opened."""
        encoded = examples.encoded if isinstance(examples, Answers) else ()
        return [len(found.input_ids) for found in encoded]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tokens, mask and labels ``(N, longest)``, and each of the pictures' tensors as ``(N, 1, …)``.

        A processor gives each of them as many rows a picture as it likes (Qwen2.5-VL one a patch). Here they
        are padded, so that a batch can be cut by examples, and ``image_rows`` ``(N, tensors)`` says how many
        count: 0 for a question without a picture. `outputs` puts them together as the model wants them.
        """
        return self._collator.batch(examples, self.padding_side == "left")

    @functools.cached_property
    def _collator(self) -> Collator:
        """Knows the tensors of pictures, if any question has one, and what else the model takes."""
        parts = self._answers.values()
        extras = {name for part in parts for e in part.encoded for name in e.extras}
        blank: dict[str, Tensor] = {}
        if any(q.picture is not None for part in parts for q in part.questions):
            side = self.image_size or BLANK
            blank = self._encoder.pixels(Image.new("RGB", (side, side), "white"))
        return Collator(self._encoder.pad, blank, extras)

    # -- model --------------------------------------------------------------------------------------------

    @functools.cached_property
    def _encoder(self) -> Encoder:
        processor = vqa_processor.load(self.model, self._config)
        return Encoder(processor, self.max_length, self.image_size, self.instruction)

    @functools.cached_property
    def target_modules(self) -> Sequence[str]:  # type: ignore[override]
        """Query and value of the language model, not of its eyes. Raises InputError where none are known."""
        with torch.device("meta"):
            model: Any = AutoModelForImageTextToText.from_config(self._config)
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        decoder = model.get_decoder()
        prefix = next(f"{name}." for name, module in model.named_modules() if module is decoder)
        for names in TARGETS:
            found = [name for name in linear if name.rpartition(".")[2] in names]
            inside = [name for name in found if name.startswith(prefix)]
            if inside:  # by their whole names where a picture's encoder has layers of the same name
                return names if len(inside) == len(found) else tuple(inside)
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise InputError(
            f"adapter.target_modules: no layers to adapt are known in a model of type "
            f"'{self._config.model_type}'; its linear ones are {', '.join(ends)}"
        )

    def _load(self, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        return pretrained.load(self.model, AutoModelForImageTextToText, self._config, seed)

    # -- loss and metrics ---------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss over the answers' tokens, and logits ``(N, T, vocabulary)``.

        Raises InputError where the processor gave a picture other places than the model has features.
        """
        try:
            found = model(**self._collator.inputs(batch), use_cache=False)
        except ValueError as error:
            if "mage features and image tokens" not in str(error):
                raise
            raise InputError(
                f"model.name_or_path: {self.model.name_or_path}: its processor does not fit the model: "
                f"{error}"
            ) from error
        return found.loss, found.logits

    def terms(self, batch: Batch) -> int:
        """Tokens that the loss is the mean of."""
        return count_terms(batch["labels"], shifted=True)

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of the answers' tokens that are the most likely one, from the model's logits and labels."""
        return token_loss.token_accuracy(*token_loss.in_place(logits, labels, shifted=True))

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """``loss`` (mean over the answers' tokens), ``log_likelihood``, ``token_accuracy``."""
        return token_loss.evaluate(model, batches, self.outputs, shifted=True)

    def test_metrics(
        self, model: nn.Module, examples: Sequence[Example], batch_size: int
    ) -> dict[str, float]:
        """The scores of generated answers."""
        if not isinstance(examples, Answers):
            return {}
        outputs = self.generate(model, examples, batch_size)
        if self.dataset == "scienceqa":
            return vqa_metrics.scienceqa(outputs, examples.questions)
        unanswerable = self.probability(model, examples, UNANSWERABLE, batch_size)
        return vqa_metrics.vizwiz(outputs, unanswerable, examples.questions)

    def generate(self, model: nn.Module, examples: Answers, batch_size: int) -> list[str]:
        """An answer to each question, greedily, in evaluation mode."""
        generator: Any = model
        texts: list[str] = []
        with evaluating(model), torch.no_grad(), generating.as_told(model):
            for part in _slices(len(examples), batch_size):
                batch = self._to_device(
                    model, self._collator.batch([examples.asked(i) for i in part], left=True)
                )
                batch.pop("labels")
                found = generator.generate(
                    **self._collator.inputs(batch),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.max_new_tokens,
                    eos_token_id=self._encoder.stops,
                    pad_token_id=self._encoder.pad,
                )
                new = found[:, batch["input_ids"].shape[1] :]
                decoded = self._encoder.tokenizer.batch_decode(new, skip_special_tokens=True)
                texts += [text.strip() for text in decoded]
        return texts

    def probability(self, model: nn.Module, examples: Answers, answer: str, batch_size: int) -> list[float]:
        """The model's probability of one and the same answer, with its end, to each question."""
        target = self._encoder.target(answer)
        found: list[float] = []
        with evaluating(model), torch.no_grad():
            for part in _slices(len(examples), batch_size):
                asked = [examples.asked(i, target) for i in part]
                batch = self._to_device(model, self._collator.batch(asked, left=True))
                _, logits = self.outputs(model, batch)
                given = batch["labels"][:, -len(target) :]
                scores = logits[:, -len(target) - 1 : -1].float().log_softmax(-1)
                chosen = scores.gather(-1, given.unsqueeze(-1)).squeeze(-1)
                found += chosen.sum(-1).exp().tolist()
        return found

    @staticmethod
    def _to_device(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        return {name: value.to(device) for name, value in batch.items()}


def _slices(length: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _draw(questions: Questions, size: int | None, seed: int, split: str) -> tuple[Questions, Questions]:
    """``size`` questions drawn at random, in their order, and the others; all where ``size`` is None."""
    if not questions:
        raise InputError(f"{split}_examples: there are no {split} questions left; make other splits smaller")
    if size is None:
        return questions, ()
    if size > len(questions):
        raise InputError(f"{split}_examples: {size} asked for, but only {len(questions)} are there")
    order = np.random.default_rng(derive_seed(seed, "split", split)).permutation(len(questions))
    chosen = set(order[:size].tolist())
    inside: tuple[Question, ...] = tuple(q for i, q in enumerate(questions) if i in chosen)
    return inside, tuple(q for i, q in enumerate(questions) if i not in chosen)
