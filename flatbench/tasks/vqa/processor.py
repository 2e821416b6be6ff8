"""A multimodal processor as a question needs it: the prompt's tokens, the answer's, the picture's tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from flatbench.errors import InputError
from flatbench.labels import IGNORED
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel
from flatbench.tasks.common.tokenising import marks_behind
from flatbench.tasks.vqa.data import LETTERS, Question

#: stands for the answer while the chat template shows what goes before and after one
_PLACE = "ANSWER"
#: what processors call further inputs with a number a token
_EXTRAS = ("mm_token_type_ids", "token_type_ids")
#: names in a processor and in a model's configuration of vision that must say the same
_SAME = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size",
         "merge_size": "spatial_merge_size"}  # fmt: skip


def load(model: PretrainedModel, config: Any) -> Any:
    """The model's processor of images and text.

    Where torchvision is missing, a processor that also takes videos is opened without its part for them,
    which transformers cannot load then; images go through Pillow.

    Raises:
        InputError: a model that takes no images and text; no processor, or one of another model.
    """
    where = f"model.name_or_path: {model.name_or_path}"
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise InputError(f"{where}: a model of type '{config.model_type}' does not answer questions about "
                         "images; choose one such as Qwen2.5-VL, LLaVA or SmolVLM")  # fmt: skip
    kind: Any = AutoProcessor
    own = PROCESSOR_MAPPING.get(type(config), None)
    if own is not None and not is_torchvision_available():
        kind = _without_videos(own)
    found = pretrained.processor(model, kind, "processor of images and text")
    if getattr(found, "image_processor", None) is None or getattr(found, "tokenizer", None) is None:
        raise InputError(f"{where}: its processor is a {type(found).__name__}, which does not take images "
                         "and text; save the model's own processor beside it")  # fmt: skip
    _check_fit(where, config, found)
    pretrained.check_vocabulary(model, config, found.tokenizer)
    return found


def _without_videos(kind: Any) -> Any:
    """The class with a part less, under its own name, which transformers looks for in the files."""

    def get_attributes(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if "video" not in name]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})


def _check_fit(where: str, config: Any, processor: Any) -> None:
    """Raise InputError if the processor says something else of images than the model."""
    said = (
        getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None),
        _image_token_id(processor),
    )
    if said[1] is None or (said[0] is not None and said[0] != said[1]):
        raise InputError(f"{where}: its processor does not fit the model: the place of an image is token "
                         f"{said[1]} to the processor and {said[0]} to the model")  # fmt: skip
    vision = getattr(config, "vision_config", None)
    for name, other in _SAME.items():
        ours = getattr(processor, name, None) or getattr(processor.image_processor, name, None)
        theirs = getattr(vision, other, None)
        if isinstance(ours, int) and isinstance(theirs, int) and ours != theirs:
            raise InputError(f"{where}: its processor does not fit the model: {name} is {ours} to the "
                             f"processor and {theirs} to the model")  # fmt: skip


def _image_token_id(processor: Any) -> int | None:
    token = getattr(processor, "image_token", None)
    token = getattr(token, "content", token)
    if not isinstance(token, str):
        return None
    found = processor.tokenizer.convert_tokens_to_ids(token)
    return None if found is None or found == processor.tokenizer.unk_token_id else int(found)


@dataclass(frozen=True)
class Encoded:
    """A question and its answer as tokens.

    Attributes:
        input_ids: prompt, the places of the image in it, answer.
        labels: as long, with `IGNORED` wherever the answer is not.
        extras: further inputs of the model with a number a token.
        whole: whether no text was cut.
    """

    input_ids: list[int]
    labels: list[int]
    extras: dict[str, list[int]]
    whole: bool

    @property
    def prompt_length(self) -> int:
        """Tokens before the answer."""
        return sum(label == IGNORED for label in self.labels)


class Encoder:
    """Makes questions into tokens and pictures into tensors, by a processor and its chat template.

    A processor without a template gets a plain prompt: the image's token, the question, "Answer:".

    Args:
        processor: as `load` gave it.
        max_length: tokens of prompt, image and answer together. Where they are more, the context loses its
            end, then the question; image, choices and answer are never cut.
        image_size: pictures are made squares of so many pixels first; as they are if None.
        instruction: text after every question, or "".
    """

    def __init__(self, processor: Any, max_length: int, image_size: int | None, instruction: str) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.max_length, self.image_size, self.instruction = max_length, image_size, instruction
        self.has_template = getattr(processor, "chat_template", None) is not None
        token = processor.image_token
        self.image_token: str = getattr(token, "content", token)
        self.image_token_id = _image_token_id(processor)
        self._picture_tokens: dict[tuple[int, int], tuple[list[int], dict[str, list[int]]]] = {}

    @property
    def pad(self) -> int:
        """The token that fills a batch's shorter texts."""
        found = self.tokenizer.pad_token_id
        return int((self.tokenizer.eos_token_id or 0) if found is None else found)

    # -- text ---------------------------------------------------------------------------------------------

    def text(self, question: Question) -> str:
        """What is asked: context, question, choices (in Qwen-VL's words for ScienceQA), instruction."""
        if not question.choices:
            return "\n".join(filter(None, [question.text, self.instruction]))
        options = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices))
        context = f"Context: {question.context or 'N/A'}"
        asked = f"{context}\nQuestion: {question.text}\nOptions: {options}"
        return "\n".join(filter(None, [asked, self.instruction]))

    def prompt(self, question: Question) -> str:
        """The whole text before the answer, with one token for the image where there is one."""
        text = self.text(question)
        if self.image_token in text:
            raise InputError(f"question {question.key}: its text holds {self.image_token}, the image's token")
        if not self.has_template:
            image = f"{self.image_token}\n" if question.picture else ""
            return f"{image}{text}\nAnswer:"
        return self._render([_message(text, question.picture is not None)], add_generation_prompt=True)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            found: str = self.processor.apply_chat_template(messages, **options)
        except Exception as error:  # whatever a template raises
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"model: its processor's chat template cannot be used: {reason}") from error
        return found

    @functools.cached_property
    def frame(self) -> tuple[str, str]:
        """What stands between a prompt and its answer, and what ends an answer."""
        end = self.tokenizer.eos_token
        if not self.has_template:
            if end is None:
                raise InputError("model: its tokenizer has no end-of-sequence token, so generation would not "
                                 "know where to stop")  # fmt: skip
            return " ", end
        asked = [_message("?", image=False)]
        before = self._render(asked, add_generation_prompt=True)
        answer = {"role": "assistant", "content": [{"type": "text", "text": _PLACE}]}
        shown, found, after = self._render([*asked, answer]).rpartition(_PLACE)
        if not found:
            raise InputError("model: its processor's chat template does not show what the assistant says")
        # where a prompt's end is no part of it (some leave room to think there), the answer follows at once
        between = shown[len(before) :] if shown.startswith(before) else ""
        return between, after.rstrip() or end or ""

    @functools.cached_property
    def stops(self) -> list[int]:
        """Tokens at which an answer ends."""
        end = self._tokens(self.frame[1])[:1]
        return sorted({*end, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id else [])})

    @functools.cached_property
    def _behind(self) -> int:
        """Special tokens that the tokenizer puts behind every text; a prompt, which goes on, has none."""
        return marks_behind(self.tokenizer)

    def _tokens(self, text: str, first: bool = False) -> list[int]:
        """Tokens of a text, with marks of a beginning if it is the first and does not bring its own."""
        mark = self.tokenizer.bos_token
        marked = first and not (mark is not None and text.startswith(mark))
        found: list[int] = self.tokenizer(text, add_special_tokens=marked, verbose=False)["input_ids"]
        return found[: len(found) - self._behind] if marked else found

    def target(self, answer: str) -> list[int]:
        """Tokens of an answer and its end."""
        between, end = self.frame
        return self._tokens(f"{between}{answer}{end}")

    # -- both ---------------------------------------------------------------------------------------------

    def encode(self, question: Question, size: tuple[int, int] | None, where: str) -> Encoded:
        """A question's tokens.

        Args:
            size: width and height of its picture, None where it has none.
            where: the question's place, for messages.

        Raises:
            InputError: even with its text cut there is no room for image, choices and answer.
        """
        target = self.target(question.answer)
        image, marks = self._image(size) if size else ([], {})
        room = self.max_length - len(target) - max(len(image) - 1, 0)
        prompt = self._tokens(self.prompt(question), first=True)
        whole = len(prompt) <= room
        if not whole:
            prompt = self._shorten_prompt(question, room, where)
        places = [i for i, token in enumerate(prompt) if token == self.image_token_id]
        if len(places) != (1 if size else 0):
            raise InputError(f"{where}: its prompt has {len(places)} places for an image, not one")
        start, stop = (places[0], places[0] + 1) if size else (0, 0)
        length = len(prompt) + len(target)
        extras = {k: [*[0] * start, *found, *[0] * (length - stop)] for k, found in marks.items()}
        tokens = [*prompt[:start], *image, *prompt[stop:]]
        labels = [*[IGNORED] * len(tokens), *target]
        return Encoded([*tokens, *target], labels, extras, whole)

    def _shorten_prompt(self, question: Question, room: int, where: str) -> list[int]:
        """The prompt's tokens with as many words of context, or else of question, as there is room for."""
        bare = question.cut(question.text, "")
        for words, least, cut in (
            (_words(question.context), 0, lambda text: question.cut(question.text, text)),
            (_words(question.text), 1, lambda text: bare.cut(text, "")),
        ):
            low, high = 0, len(words)  # so many fit, so many do not
            while high - low > 1:
                middle = (low + high) // 2
                fits = len(self._prompt_tokens(cut, words, middle)) <= room
                low, high = (middle, high) if fits else (low, middle)
            found = self._prompt_tokens(cut, words, low)
            if words and low >= least and len(found) <= room:
                return found
        raise InputError(f"max_length: {where}: image, choices and answer alone have more than "
                         f"{self.max_length} tokens")  # fmt: skip

    def _prompt_tokens(self, cut: Any, words: Sequence[str], count: int) -> list[int]:
        return self._tokens(self.prompt(cut("".join(words[:count]).rstrip())), first=True)

    # -- pictures -----------------------------------------------------------------------------------------

    def sized(self, image: Image.Image) -> Image.Image:
        """A picture in the size in which the processor gets it."""
        if self.image_size is None:
            return image
        return image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)

    def _image(self, size: tuple[int, int]) -> tuple[list[int], dict[str, list[int]]]:
        """Tokens that stand for a picture of this size, and further inputs at these tokens."""
        if size not in self._picture_tokens:
            found = self._process(Image.new("RGB", size))
            marks = {name: found[name][0].tolist() for name in _EXTRAS if name in found}
            self._picture_tokens[size] = found["input_ids"][0].tolist(), marks
        return self._picture_tokens[size]

    def pixels(self, image: Image.Image) -> dict[str, Tensor]:
        """A picture's tensors, as the model takes them for one picture."""
        of_text = ("input_ids", "attention_mask", *_EXTRAS)
        return {name: value for name, value in self._process(image).items() if name not in of_text}

    def _process(self, image: Image.Image) -> dict[str, Any]:
        try:
            return dict(self.processor(text=[self.image_token], images=[image], return_tensors="pt",
                                       add_special_tokens=False))  # fmt: skip
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"model: its processor does not take a picture of {image.size}: {reason}"
            ) from error


def _message(text: str, image: bool) -> dict[str, Any]:
    content: list[dict[str, str]] = [{"type": "image"}] if image else []
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _words(text: str) -> list[str]:
    return re.findall(r"\S+\s*", text)
