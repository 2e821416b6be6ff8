"""Frozen base models in four or eight bits, by bitsandbytes, under an adapter that trains."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig

from flatbench.errors import InputError

Quantization = Literal["4bit", "8bit"]


def check(how: Quantization | None) -> None:
    """Raise InputError where a model is to be quantised and bitsandbytes is not installed."""
    if how and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"model.quantization: {how} needs the package bitsandbytes; install it: "
            "pip install 'flatbench-lora[quantization]'"
        )


def config(how: Quantization, kept: Sequence[str] | None) -> BitsAndBytesConfig:
    """transformers' settings: for four bits QLoRA's (NF4, doubly quantised, computing in bfloat16).

    Args:
        kept: modules that stay as they are because they start from random weights and train; None leaves to
            transformers what to keep (the output layer).
    """
    skipped = list(kept) if kept else None
    if how == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def prepared(model: nn.Module, missing: Sequence[str], how: Quantization, name: str) -> nn.Module:
    """A loaded model ready for an adapter: frozen, and what is not quantised in float32, as peft advises.

    Args:
        missing: modules of which the files had no weights.
        name: the model's, for messages.

    Raises:
        InputError: nothing in the model could be quantised, or something that has to train was.
    """
    if not quantized(model):
        raise InputError(
            f"model.quantization: {name} has no linear layer that could be put into {how}; leave it out"
        )
    for module in missing:
        if quantized(model.get_submodule(module)):
            raise InputError(
                f"model.quantization: {name}: its files lack the weights of {module}, which would have to be "
                f"trained and cannot in {how}; leave quantization out"
            )
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack the weights for some CPUs in the first evaluation, and round their
            # scales while it does: training would go on with another model
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    # eight-bit layers say at every call that they compute in float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    done: Any = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    ready: nn.Module = done
    return ready


def quantized(model: nn.Module) -> bool:
    """Whether any weight is no floating-point number."""
    return any(not parameter.is_floating_point() for parameter in model.parameters())
