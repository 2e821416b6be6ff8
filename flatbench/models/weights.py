"""Saving, loading and digesting what was trained, as safetensors.

Training moves batch statistics too, which peft's files leave out: an adapter's folder holds them beside the
adapter, in ``buffers.safetensors``, where the model has any buffers that are part of its state.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from flatbench.errors import InputError
from flatbench.models.factors import trainable_parameters
from flatbench.store.files import file_digest, replacing

#: the file of an adapter's folder with the model's buffers
BUFFERS = "buffers.safetensors"


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of a model's state, such as batch statistics."""
    return {
        f"{place}.{name}" if place else name: buffer
        for place, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def has_statistics(model: nn.Module) -> bool:
    """Whether training moves running statistics of normalization layers."""
    return any(isinstance(m, _NormBase) and m.track_running_stats for m in model.modules())


def load_buffers(model: nn.Module, folder: Path) -> None:
    """Load the buffers that `save` wrote beside an adapter.

    Raises InputError if they do not fit the model, or are missing and the model has batch statistics.
    """
    path = folder / BUFFERS
    own = buffers(model)
    if not path.is_file():
        if has_statistics(model):
            raise InputError(
                f"{folder}: no {BUFFERS} beside the adapter, but the model has batch statistics, which "
                "training moved; the trained function cannot be had from the adapter alone. Train it again, "
                "or save the buffers with flatbench.models.weights.save"
            )
        return
    _check_file(path)
    stored = load_file(path)
    wrong = sorted(set(stored) ^ set(own)) or [n for n in own if own[n].shape != stored[n].shape]
    if wrong:
        raise InputError(f"{path}: does not fit the model; differing buffers: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(stored[name])


def check_same(trained: nn.Module, loaded: nn.Module) -> None:
    """Raise InputError unless what was saved and loaded again is what was trained, to the bit."""
    first = {**dict(trained.named_parameters()), **buffers(trained)}
    second = {**dict(loaded.named_parameters()), **buffers(loaded)}
    for name, tensor in first.items():
        other = second.get(name)
        if other is None or not torch.equal(tensor.detach().cpu(), other.detach().cpu()):
            raise InputError(
                f"{name} is not saved with what was trained: the model that is loaded would be another one; "
                "please report the model's kind, or train without an adapter"
            )


def save(model: nn.Module, folder: Path) -> None:
    """Write what was trained into ``folder`` as safetensors: peft's adapter layout, or the whole model."""
    writer: Any = model
    with replacing(folder, durable=True) as temporary:
        writer.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
        if isinstance(model, peft.PeftModel) and (own := buffers(model)):
            save_file({n: b.detach().cpu().clone().contiguous() for n, b in own.items()}, temporary / BUFFERS)


def digest(model: nn.Module) -> str:
    """Hex SHA-256 of all parameters of a model, so that a changed start is noticed.

    Weights that accelerate has put away are read, one at a time.
    """
    found = hashlib.sha256()
    for name, parameter in [*model.named_parameters()]:
        found.update(name.encode())
        with _in_memory(model, name, parameter) as held:
            found.update(held.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def _in_memory(model: nn.Module, name: str, parameter: nn.Parameter) -> Iterator[Tensor]:
    """Lend a parameter out; one that accelerate has put away is brought by its module's hook for the time."""
    if parameter.device.type != "meta":
        yield parameter
        return
    from accelerate.utils import align_module_device

    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    with align_module_device(owner, torch.device("cpu")):
        held = owner.get_parameter(key)
        if held.device.type == "meta":
            raise InputError(
                f"{name} is not in memory, and its layer brings nothing: load the model's weights"
            )
        yield held


def saved_digest(folder: Path) -> str:
    """Hex SHA-256 of the safetensors file that `save` wrote."""
    return file_digest(weights_file(folder))


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
    _check_file(weights_file(folder))


def _check_file(path: Path) -> None:
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
    if isinstance(model, peft.PeftModel):
        load_buffers(model, folder)


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
