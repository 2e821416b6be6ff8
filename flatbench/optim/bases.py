"""Base optimizers that a study may name: torch's, schedule-free ones, bitsandbytes' and pytorch_optimizer's.

Another package adds one by an entry point in the group ``flatbench.base_optimizers``:
``name = "module:Class"``. A study names no other class, so that it runs no code but that of optimizers which
its reader has installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flatbench.config.registry import Registry
from flatbench.config.sections import BaseOptimizerOptions
from flatbench.config.validation import validated
from flatbench.errors import InputError, shown, suggest

_CLASSES = {
    "torch.optim": "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax Muon NAdam RAdam RMSprop Rprop SGD",
    "schedulefree": (
        "AdamWScheduleFree AdamWScheduleFreePaper AdamWScheduleFreeReference RAdamScheduleFree "
        "SGDScheduleFree SGDScheduleFreeReference"
    ),
    "bitsandbytes.optim": (
        "AdEMAMix AdEMAMix8bit Adagrad Adagrad32bit Adagrad8bit Adam Adam32bit Adam8bit AdamW AdamW32bit "
        "AdamW8bit LAMB LAMB32bit LAMB8bit LARS LARS32bit LARS8bit Lion Lion32bit Lion8bit PagedAdEMAMix "
        "PagedAdEMAMix8bit PagedAdam PagedAdam32bit PagedAdam8bit PagedAdamW PagedAdamW32bit PagedAdamW8bit "
        "PagedLion PagedLion32bit PagedLion8bit RMSprop RMSprop32bit RMSprop8bit SGD SGD32bit SGD8bit"
    ),
    # not those that are methods themselves, need another optimizer, the model or a graph of gradients, or
    # cannot be resumed exactly from their state
    "pytorch_optimizer": (
        "ADOPT APOLLO ASGD AccSGD AdEMAMix AdaBelief AdaBound AdaDelta AdaFactor AdaGC AdaMax AdaMod AdaNorm "
        "AdaPNM AdaSmooth AdaTAM Adai Adalite Adam AdamC AdamG AdamP AdamS AdamW AdamWSN Adan AggMo "
        "Aida Alice Amos Ano ApolloDQN AvaGrad BCOS CAME DASH DAdaptAdaGrad DAdaptAdam DAdaptAdan "
        "DAdaptLion DAdaptSGD DiffGrad DualAdam EXAdam EmoFact EmoLynx EmoNavi FAdam FOCUS FTRL Fira "
        "FlashAdamW Fromage GaLore Grams Gravity GrokFastAdamW Kate LARS LaProp Lamb Lion MADGRAD "
        "MARS MSVAG NAdam Nero NovoGrad PAdam PID PNM Prodigy QHAdam QHM RACS RAdam RMSprop Ranger "
        "SCION SCIONLight SGD SGDP SGDSaI SGDW SM3 SPAM SRMM SWATS SaRA "
        "ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD Shampoo SignSGD SimplifiedAdEMAMix StableAdamW "
        "StableSPAM TAM Tiger VSGD Yogi"
    ),
}
_INSTALL = {
    "schedulefree": "schedulefree",
    "bitsandbytes": "bitsandbytes",
    "pytorch_optimizer": "--no-deps pytorch-optimizer",
}
#: what a study says in its ``train`` section
_OF_TRAIN = ("params", "lr", "weight_decay")
_OWN = ("adamw", "adam", "sgd")

REGISTRY = Registry(
    "base optimizer",
    {f"{module}.{name}": f"{module}:{name}" for module, names in _CLASSES.items() for name in names.split()},
    group="flatbench.base_optimizers",
)


def checked(raw: Any, source: str, where: str) -> dict[str, Any]:
    """The ``base`` of an optimizer section: name and options, which the optimizer itself has accepted.

    Raises InputError for an unknown name, a package that is not installed, and options that it refuses.
    """
    base = {"name": raw} if isinstance(raw, str) else raw
    name = base.get("name") if isinstance(base, Mapping) else None
    if not isinstance(name, str) or name in _OWN:
        found: dict[str, Any] = validated(BaseOptimizerOptions, base, source, where).model_dump(mode="json")
        return found
    if name not in REGISTRY:
        known = [*_OWN, *REGISTRY.names()]
        raise InputError(f"{source}: {where}: unknown base optimizer '{shown(name)}'; {suggest(name, known)}")
    options = {key: value for key, value in base.items() if key != "name"}
    kind = load(name, f"{source}: {where}")
    known = [key for key in inspect.signature(kind).parameters if key not in _OF_TRAIN]
    for key in options:
        if key in _OF_TRAIN:
            raise InputError(f"{source}: {where}.{key}: is said in the section train, for all methods alike")
        if key not in known:
            raise InputError(
                f"{source}: {where}.{shown(key)}: no option of {name}; {suggest(str(key), known)}"
            )
    try:
        kind([_parameter()], lr=1e-3, **as_arguments(options))
    except Exception as error:  # what others raise is theirs to choose
        raise InputError(f"{source}: {where}: {name} refuses its options: {shown(error, 200)}") from error
    return {"name": name, **options}


def _parameter() -> Any:
    """A small matrix, on which an optimizer is tried; torch is not needed for less."""
    import torch

    return torch.nn.Parameter(torch.zeros(2, 2))


def load(name: str, where: str) -> Any:
    """The class of that name. Raises InputError where its package is not installed."""
    try:
        return REGISTRY.load(name)
    except (ImportError, AttributeError) as error:
        package = name.partition(".")[0]
        install = f"; pip install {_INSTALL[package]}" if package in _INSTALL else ""
        raise InputError(f"{where}: {name} is not installed here ({error}){install}") from error


def as_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of a file as tuples, which is what optimizers expect of betas."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
