"""Writes a model that has only pickled weights as safetensors, once and on the user's own command.

Nothing else in flatbench opens a pickle. Here torch reads it with ``weights_only``: tensors and plain
containers, and an error for anything that would have to be called.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatbench.errors import InputError
from flatbench.models import pretrained
from flatbench.models.pretrained import PretrainedModel

WEIGHTS, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SAFE, _SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"


def convert(name_or_path: str, output: Path, revision: str | None = None) -> list[Path]:
    """Write the model's configuration, tokenizer and weights to a new folder, the weights as safetensors.

    Args:
        name_or_path: a folder, or a name on the hub, of which the pickle and the small files are fetched.
        output: a folder that is not there yet, or an empty one.

    Returns:
        The files of weights.

    Raises:
        InputError: nothing to convert, a pickle that holds more than weights, a folder that is in use.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} is there already; name a new folder")
    source = _source(PretrainedModel(name_or_path=name_or_path, revision=revision))
    where = f"{name_or_path}: "
    if list(source.glob("*.safetensors")):
        raise InputError(f"{where}it has safetensors already; use it as it is")
    shards = _shards(source, where)
    tensors = {shard: _read(source / shard, where) for shard in shards}
    output.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    places: dict[str, str] = {}
    for number, (_, weights) in enumerate(tensors.items(), start=1):
        file = _SAFE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(weights, output / file)
        places |= dict.fromkeys(weights, file)
        written.append(output / file)
    if len(shards) > 1:
        size = sum(t.numel() * t.element_size() for weights in tensors.values() for t in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (output / _SAFE_INDEX).write_text(json.dumps(index, indent=2))
    for path in source.iterdir():
        if path.is_file() and path.suffix in pretrained.CONTENT and path.name != INDEX:
            shutil.copyfile(path, output / path.name)
    return written


def _source(model: PretrainedModel) -> Path:
    if model.folder is not None:
        return model.folder
    wanted = [f"*{ending}" for ending in pretrained.CONTENT if ending != ".safetensors"]
    try:
        return Path(
            snapshot_download(
                model.name_or_path, revision=model.revision, allow_patterns=[*wanted, "pytorch_model*.bin"]
            )
        )
    except Exception as error:  # whatever the hub's client raises
        raise pretrained.refusal(model, "files", error) from error


def _shards(source: Path, where: str) -> list[str]:
    if (source / INDEX).is_file():
        try:
            named = sorted(set(json.loads((source / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{where}{INDEX} is damaged ({error})") from error
        # names from a file of somebody else: within this folder only
        if any(Path(str(name)).name != name or not (source / name).is_file() for name in named):
            raise InputError(f"{where}{INDEX} names files that are not there")
        return [str(name) for name in named]
    if not (source / WEIGHTS).is_file():
        raise InputError(f"{where}no {WEIGHTS} to convert, and no {INDEX}")
    return [WEIGHTS]


def _read(path: Path, where: str) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in as many ways as there are
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}{path.name} holds more than weights, or is damaged: {reason}") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{where}{path.name} holds no weights by name")
    return {str(name): value for name, value in found.items()}


def _write(weights: dict[str, Tensor], path: Path) -> None:
    """Each tensor for itself: safetensors has no shared ones, and a model ties them again. Read back."""
    apart = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(apart, path, metadata={"format": "pt"})
    again = load_file(path)
    assert again.keys() == apart.keys()
    assert all(torch.equal(again[name].nan_to_num(), apart[name].nan_to_num()) for name in apart)
