"""Reject methods that cannot work on a quantized or sharded model."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from flatbench.errors import InputError
from flatbench.study.methods import Method


def check(
    model: Mapping[str, Any],
    method: Method,
    measured: Mapping[str, Mapping[str, Any]],
    source: str,
    place: str,
) -> None:
    """Raise InputError for a method that cannot train a model as the study has it kept.

    Args:
        model: the ``model`` section.
        measured: label -> options of the study's measures.
        place: of the method in the study file ``source``.
    """
    _check_quantization(model, method, f"{source}: {place}")
    _check_divided_state(method, source)
    if method.train.sharded:
        _check_shards(model, method, measured, source)


def _check_quantization(model: Mapping[str, Any], method: Method, where: str) -> None:
    """Raise InputError for a method that moves or decomposes weights which the model has in a few bits."""
    how = model.get("quantization")
    if how and method.adapter.name == "none":
        raise InputError(
            f"{where}: full fine-tuning moves every weight, and model.quantization keeps them frozen in "
            f"{how}; choose an adapter, or leave quantization out"
        )
    if how and method.adapter.init == "pissa":
        raise InputError(
            f"{where}: PiSSA starts from the decomposed weights, which are in {how} here; choose another init"
        )


def _check_divided_state(method: Method, source: str) -> None:
    """Raise InputError where DeepSpeed is to divide what trains, and it is more than an adapter."""
    deepspeed = method.train.accelerate.deepspeed_config if method.train.accelerate else None
    if deepspeed and deepspeed.zero_stage in (1, 2) and method.adapter.name == "none":
        raise InputError(
            f"{source}: train.accelerate.deepspeed_config.zero_stage: {deepspeed.zero_stage} divides "
            f"gradients and the optimizer's state, which is not done here, and method '{method.name}' "
            "trains every weight; choose stage 3, which divides them with the weights, or an adapter"
        )


def _check_shards(
    model: Mapping[str, Any], method: Method, measured: Mapping[str, Mapping[str, Any]], source: str
) -> None:
    """Raise InputError for what cannot be done with a model that lies in shards."""
    kind = method.train.accelerate.distributed_type if method.train.accelerate else ""
    where = f"{source}: train.accelerate.distributed_type: {kind}"
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise InputError(
            f"{where} needs the package deepspeed; install it: pip install --no-build-isolation "
            "'flatbench-lora[deepspeed]'"
        )
    if model.get("quantization"):
        raise InputError(
            f"{where} cannot divide weights in {model['quantization']}; leave model.quantization out, or "
            "train.accelerate: then each process holds the whole base in a few bits"
        )
    if method.adapter.name == "none" and method.optimizer.get("m_sharpness"):
        raise InputError(
            f"{where} averages the gradients of sharded weights at once, and optimizer.m_sharpness of "
            f"method '{method.name}' needs each process's own; choose an adapter, or leave one out"
        )
    if method.adapter.name == "none" and method.optimizer["name"] == "ivon":
        raise InputError(
            f"{where} divides what method '{method.name}' trains, and ivon draws whole parameters; choose an "
            "adapter, or leave one out"
        )
    label = next((label for label, options in measured.items() if options.get("every")), None)
    if label is not None:
        raise InputError(
            f"{where} has no whole model before training ends, and measure '{label}' is to be taken within "
            "it; leave its option every out"
        )
