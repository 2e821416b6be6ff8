"""Names of a model's inputs and labels, kinds and names of its classes, its limits, as it says them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from flatbench.labels import shifts, unwrapped
from flatbench.models.pretrained import longest_input

#: ``class``: one of several; ``score``: numbers; ``several``: a 0 or 1 for each class; ``token``: a class for
#: each token; ``next token``: the text itself; ``span``: start and end; ``none``: the loss needs no labels;
#: ``unknown``: the model does not say
Kind = Literal["class", "score", "several", "token", "next token", "span", "none", "unknown"]

#: labels of models that mark a span of the text
SPAN = ("start_positions", "end_positions")
#: inputs that come beside others, and do not make an example by themselves
SECONDARY = {"attention_mask", "token_type_ids", "position_ids", "noise", "bool_masked_pos"}
_UNNAMED = re.compile(r"LABEL_\d+")
_ONE_LABEL = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")


@dataclass(frozen=True)
class Expected:
    """What a model takes.

    Attributes:
        inputs: names of the arguments of its forward pass, in their order, labels among them.
        anything: whether it takes further arguments by name.
        labels: names of the arguments that hold labels.
        kind: what a label is.
        classes: how many classes there are; None where the model does not say.
        names: names of the classes in their order; empty where they have none.
        vocabulary: number of tokens; None where the model does not say.
        longest: tokens that it can take; None where nothing limits them.
        padding: the token by which the model knows what is padding; None where it knows none.
        encoder_decoder: whether labels are a text of their own.
    """

    inputs: tuple[str, ...]
    anything: bool
    labels: tuple[str, ...]
    kind: Kind
    classes: int | None
    names: tuple[str, ...]
    vocabulary: int | None
    longest: int | None
    padding: int | None
    encoder_decoder: bool

    @property
    def label(self) -> str:
        """The name under which the model takes its label."""
        return next((n for n in self.labels if n in ("labels", "label", "targets")), "labels")

    def ready(self, columns: Iterable[str]) -> list[str]:
        """Those of some columns that are the model's inputs, labels left out."""
        taken = [c for c in columns if c in self.inputs and c not in self.labels]
        if not self.inputs:  # (**batch)
            taken = [c for c in columns if c in ("input_ids", "attention_mask", "pixel_values", "inputs")]
        return taken if set(taken) - SECONDARY else []


def expected(model: nn.Module) -> Expected:
    """What a model takes, as far as it says."""
    inner: Any = unwrapped(model)
    parameters = list(inspect.signature(inner.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    inputs = tuple(p.name for p in named)
    labels = tuple(n for n in inputs if "label" in n or n in (*SPAN, "targets"))
    config = getattr(inner, "config", None)
    kind = _kind(inner, config, inputs, labels)
    names = _names(config) if kind in ("class", "several", "token") else ()
    return Expected(
        inputs,
        any(p.kind == p.VAR_KEYWORD for p in parameters),
        labels,
        kind,
        _classes(inner, config, kind),
        names,
        _vocabulary(inner),
        _longest(config),
        _padding(inner, config),
        bool(getattr(config, "is_encoder_decoder", False)),
    )


def _ends(inner: nn.Module, endings: str | Sequence[str]) -> bool:
    """Whether the model is one of transformers' classes with such a name, or made from one."""
    return any(kind.__name__.endswith(tuple(endings)) for kind in type(inner).__mro__)


def _kind(inner: Any, config: Any, inputs: Sequence[str], labels: Sequence[str]) -> Kind:
    if set(SPAN) <= set(labels):
        return "span"
    if hasattr(config, "mask_ratio") and "noise" in inputs:
        return "none"
    if "bool_masked_pos" in inputs and not labels:
        return "none"
    if config is None or not labels:
        return "unknown"
    if shifts(inner):
        return "next token"
    if _ends(inner, _ONE_LABEL):
        told = getattr(config, "problem_type", None)
        if told == "regression" or (told is None and getattr(config, "num_labels", None) == 1):
            return "score"
        return "several" if told == "multi_label_classification" else "class"
    if _ends(inner, ["ForTokenClassification"]) or _output_words(inner) is not None:
        return "token"
    return "unknown"


def _output_words(inner: Any) -> int | None:
    try:
        head = inner.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    weight = getattr(head, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _classes(inner: Any, config: Any, kind: Kind) -> int | None:
    if kind in ("class", "several", "score") or (
        kind == "token" and _ends(inner, ["ForTokenClassification"])
    ):
        return int(config.num_labels)
    return _output_words(inner) if kind in ("token", "next token") else None


def _names(config: Any) -> tuple[str, ...]:
    found = getattr(config, "id2label", None) or {}
    try:
        names = tuple(str(found[i]) for i in range(len(found)))
    except KeyError:
        return ()
    return () if all(_UNNAMED.fullmatch(name) for name in names) else names


def _vocabulary(inner: Any) -> int | None:
    try:
        return int(inner.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _longest(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if text is None or not hasattr(text, "model_type"):
        return None
    try:
        return longest_input(text)
    except (AttributeError, TypeError):
        return None


def _padding(inner: Any, config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = next((p for c in (config, text) if (p := getattr(c, "pad_token_id", None)) is not None), None)
    words = _vocabulary(inner)
    return found if found is not None and found >= 0 and (words is None or found < words) else None
