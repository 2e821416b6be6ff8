"""A model made ready to train: wrapped by peft, started from given factors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import peft
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from flatbench.config.sections import AdapterOptions
from flatbench.errors import InputError
from flatbench.models.projections import query_and_value
from flatbench.models.quiet import quiet
from flatbench.models.weights import check, saved_digest, weights_file
from flatbench.store.files import read_mapping

log = logging.getLogger(__name__)


def adapt(
    model: nn.Module, options: AdapterOptions, target_modules: Sequence[str], modules_to_save: Sequence[str]
) -> nn.Module:
    """The model made ready to train: wrapped by peft, or with every weight trainable for ``none``.

    Args:
        target_modules: used where the options name none.
        modules_to_save: modules trained in full beside the adapter (a new classification head).
    """
    if options.name == "none":
        return model.requires_grad_(True)
    if options.target == "qv":
        target_modules = query_and_value(model)
    target_modules = list(options.target_modules or target_modules)
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=target_modules,
        fan_in_fan_out=_all_transposed(model, target_modules),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=options.init,
    )
    try:
        return _wrap(model, config)
    except ValueError as error:  # peft's message names the modules that it did not find
        raise InputError(f"adapter.target_modules: {error}") from error


def _wrap(model: nn.Module, config: peft.LoraConfig) -> nn.Module:
    """peft's model, without what peft says of cases that are taken care of here."""
    # peft asks transformers for an attribute that it has renamed, which `quiet` leaves unsaid
    with quiet(), warnings.catch_warnings(record=True) as said:
        adapted: nn.Module = peft.get_peft_model(model, config)
    tied = [one for one in said if "tie_word_embeddings" in str(one.message)]
    if tied:
        log.info(
            "a weight that is used twice is adapted: the adapter counts where it stands, and merging it for "
            "good takes a model whose weights are untied"
        )
    for one in said:  # for each kind of layer peft sets fan_in_fan_out as it must be
        if one not in tied and "fan_in_fan_out is set to" not in str(one.message):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return adapted


def _all_transposed(model: nn.Module, target_modules: Sequence[str]) -> bool:
    """Whether all that is adapted keeps its weight as ``(in, out)``: GPT-2's layers, as peft must know."""
    ends = tuple(f".{name}" for name in target_modules)
    adapted = [type(module) for name, module in model.named_modules() if f".{name}".endswith(ends)]
    return Conv1D in adapted and nn.Linear not in adapted


def start_digest(options: AdapterOptions) -> str | None:
    """Hex SHA-256 of the weights that ``init_from`` names; None where it names none.

    Raises InputError if no adapter is there, or one of another rank or scaling than the options'.
    """
    if options.init_from is None:
        return None
    folder, where = Path(options.init_from).expanduser(), f"adapter.init_from: {options.init_from}"
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{where}: no adapter here (no adapter_config.json)")
    check(folder)
    stored = read_mapping(folder / "adapter_config.json")
    ours = {"r": options.r, "lora_alpha": options.alpha, "use_rslora": options.rslora, "use_dora": False}
    for key, value in ours.items():
        if stored.get(key, value) != value:
            raise InputError(f"{where}: its {key} is {stored[key]}, and the study's {value}")
    return saved_digest(folder)


def start_from(model: nn.Module, folder: Path) -> None:
    """Give a peft model the A and B that another one was saved with; other weights stay as they are.

    Raises InputError if they are not of the same modules and shapes.
    """
    whole = peft.get_peft_model_state_dict(model)
    own = {name: p for name, p in whole.items() if ".lora_" in name}
    stored = {name: p for name, p in load_file(weights_file(folder)).items() if ".lora_" in name}
    wrong = sorted({*own} ^ {*stored})
    wrong += [name for name in own if name in stored and own[name].shape != stored[name].shape]
    if wrong:
        raise InputError(
            f"adapter.init_from: {folder}: does not fit the model; differing weights: {', '.join(wrong[:3])}"
        )
    peft.set_peft_model_state_dict(model, {**whole, **stored})  # peft wants the heads too
