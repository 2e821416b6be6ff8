"""peft adapters: build one, list its low-rank factors, save and load what was trained."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from flatbench.config.sections import AdapterOptions
from flatbench.errors import InputError
from flatbench.store.files import read_mapping, replacing

Kind = Literal["linear", "convolution", "embedding"]


@dataclass(frozen=True)
class LoRAFactors:
    """One adapted weight ``W = W0 + scaling * B @ A``, W being ``(n, m)``: outputs by inputs.

    A convolution's W is its kernel as ``(n, channels·height·width)``, and its factors are kernels too, to be
    flattened from the second dimension on. W of an embedding is ``(dimensions, words)``, the transpose of
    what torch stores.

    Attributes:
        name: the adapted module's name in the model.
        A: parameter of shape ``(r, m)``, or ``(r, channels, height, width)`` of a convolution.
        B: parameter of shape ``(n, r)``, or ``(n, r, 1, 1)``; zeros at the start unless the initialisation
            says else. In an embedding it is A that starts with zeros.
        layer: peft's layer, which owns the scaling.
        adapter: peft's name of the adapter.
        kind: what the module is; Conv1D of GPT-2 counts as linear.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    layer: LoraLayer
    adapter: str
    kind: Kind = "linear"

    @property
    def scaling(self) -> float:
        """``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA), read from peft's layer, never recomputed."""
        return float(self.layer.scaling[self.adapter])


def lora_factors(model: nn.Module) -> list[LoRAFactors]:
    """The low-rank factors of every active adapter of a peft model of which A or B trains, in module order.

    Factors that share their storage with earlier ones (of tied weights) are listed once.

    Raises InputError for an adapted module whose adapter is no product of two matrices.
    """
    found: list[LoRAFactors] = []
    seen: set[tuple[int, int]] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            factors = _factors(name, module, adapter)
            if factors is None or not (factors.A.requires_grad or factors.B.requires_grad):
                continue
            # 0 of tensors without memory, which share none
            A, B = (p.untyped_storage().data_ptr() or id(p) for p in (factors.A, factors.B))
            # a head tied to an embedding holds the embedding's A as its B
            if (A, B) in seen or (B, A) in seen:
                continue
            seen.add((A, B))
            found.append(factors)
    return found


def _factors(name: str, module: LoraLayer, adapter: str) -> LoRAFactors | None:
    """What ``adapter`` is on ``module``; None if it is not there."""
    if adapter in module.lora_embedding_A:
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        return LoRAFactors(name, A, B, module, adapter, "embedding")
    if adapter not in module.lora_A:
        return None
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    grouped = getattr(module.get_base_layer(), "groups", 1) > 1
    if getattr(module, "num_experts", 1) > 1 or grouped:
        what = "grouped convolutions" if grouped else "stacked experts"
        raise InputError(
            f"{name} ({type(module).__name__}): the adapter of {what} is no product B·A of two matrices; "
            "leave this module out of target_modules"
        )
    return LoRAFactors(name, A, B, module, adapter, "linear" if A.ndim == 2 else "convolution")


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
    config = peft.LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.target_modules or target_modules),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=options.rslora,
        use_dora=options.dora,
        init_lora_weights=options.init,
    )
    try:
        with warnings.catch_warnings():  # what peft sets by itself for GPT-2's layers needs no word a run
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False but")
            return peft.get_peft_model(model, config)
    except ValueError as error:  # peft's message names the modules that it did not find
        raise InputError(f"adapter.target_modules: {error}") from error


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
    return file_digest(folder)


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


def adapted_modules(model: nn.Module, target_modules: Sequence[str]) -> list[str]:
    """Names, in the base model, of the modules that an adapter with ``target_modules`` treats.

    They span the ``merged`` space, for a model with no adapter as well.
    """
    if isinstance(model, peft.PeftModel):
        prefix = "base_model.model."
        return [n.removeprefix(prefix) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    return [
        name
        for name, _ in model.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in target_modules)
    ]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def save(model: nn.Module, folder: Path) -> None:
    """Write what was trained into ``folder`` as safetensors: peft's adapter layout, or the whole model."""
    writer: Any = model
    with replacing(folder, durable=True) as temporary:
        writer.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card


def digest(model: nn.Module) -> str:
    """Hex SHA-256 of all parameters of a model, so that a changed start is noticed."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def file_digest(folder: Path) -> str:
    """Hex SHA-256 of the safetensors file that `save` wrote."""
    with weights_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_file(folder: Path) -> Path:
    """The safetensors file that `save` wrote. Raises InputError if there is none."""
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: no adapter_model.safetensors or model.safetensors here; only safetensors files are read"
    )


def check(folder: Path) -> None:
    """Raise InputError if the saved weights are missing, truncated or no safetensors file."""
    path = weights_file(folder)
    try:
        with safe_open(path, framework="pt") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({error})") from error


def load(model: nn.Module, folder: Path) -> None:
    """Load what `save` wrote into a model that `adapt` made in the same way.

    Raises InputError if the file is damaged or does not fit the model.
    """
    check(folder)
    path = weights_file(folder)
    wrong = _load_adapter(model, path) if isinstance(model, peft.PeftModel) else _load_whole(model, folder)
    if wrong:
        raise InputError(f"{path}: does not fit the model; differing weights: {', '.join(wrong[:3])}")


def _load_adapter(model: peft.PeftModel, path: Path) -> list[str]:
    """Names of weights that the file lacks or has beyond what the adapter trains."""
    try:
        outcome = peft.set_peft_model_state_dict(model, load_file(path))
    except RuntimeError as error:  # torch's words for a size mismatch, over many lines
        raise InputError(f"{path}: does not fit the model; {' '.join(str(error).split())[:300]}") from error
    missing = set(trainable_parameters(model)) & set(outcome.missing_keys)
    return [*outcome.unexpected_keys, *sorted(missing)]


def _load_whole(model: nn.Module, folder: Path) -> list[str]:
    # through transformers: the names in its files are not always those of its modules
    reader: Any = type(model)
    stored, info = reader.from_pretrained(
        folder,
        config=model.config,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    wrong = sorted({*map(str, info["missing_keys"]), *map(str, info["unexpected_keys"])})
    wrong += sorted(str(entry) for entry in info["mismatched_keys"])
    if not wrong:
        model.load_state_dict(stored.state_dict())
    return wrong
