"""Training state as one safetensors file: dicts and lists of tensors and plain values, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flatbench.errors import InputError
from flatbench.store.files import replacing


def save(path: Path, tree: Any, previous: Path | None = None) -> None:
    """Write ``tree`` whole or not at all, with a checksum.

    Args:
        previous: where what was at ``path`` is kept, in case the new file turns out damaged.

    Raises TypeError for a value that is neither a tensor, a number, a string, None, a list nor a dict.
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_flatten(tree, tensors))
    with replacing(path, durable=True) as temporary:
        save_file(tensors, temporary, metadata={"tree": skeleton, "sha256": _digest(skeleton, tensors)})
        if previous is not None and path.is_file():
            os.replace(path, previous)


def load(path: Path) -> Any:
    """What `save` wrote, tensors on the CPU. Raises InputError if the file or its checksum is damaged."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if _digest(metadata["tree"], tensors) != metadata["sha256"]:
            raise ValueError("its checksum is another one")
        return _unflatten(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged training state ({error})") from error


def _digest(skeleton: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(skeleton.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flatten(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):
        # pairs, because JSON would turn the integer keys of an optimizer's state into strings
        return {"dict": [[key, _flatten(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list) and all(map(_is_row, node)):
        return {"rows": node}  # a history of thousands of steps, written after every epoch
    if isinstance(node, list | tuple):
        return {"list" if isinstance(node, list) else "tuple": [_flatten(value, tensors) for value in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(f"cannot store a {type(node).__name__} in a training state")


def _is_row(node: Any) -> bool:
    """Whether JSON has it as it is: a dict of texts and numbers by texts."""
    return type(node) is dict and _PLAIN.issuperset(map(type, node.values())) and {*map(type, node)} <= {str}


_PLAIN = frozenset({bool, int, float, str, type(None)})


def _unflatten(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "rows":
        return content
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    values = [_unflatten(value, tensors) for value in content]
    return values if kind == "list" else tuple(values)
