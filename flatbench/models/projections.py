"""Query and value as modules of their own, in models that compute query, key and value by one matrix too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flatbench.errors import InputError

#: what models call query and value where they are apart
QUERY_AND_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("query_proj", "value_proj"),
    ("q", "v"),
)


class SplitProjection(nn.Module):
    """The projections of GPT-2's ``c_attn`` as three linear layers, whose outputs are laid side by side.

    It computes what the fused layer did, from copies of its weights. peft's LoRA on the fused layer has one A
    for all three and a B of 3·n rows, so that query, key and value share what they read of the input, and key
    is adapted with them; on these layers each has its own A.

    Args:
        fused: ``(n, 3·n)``, as transformers stores it.
    """

    def __init__(self, fused: Conv1D) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias)
            for weight, bias in zip(fused.weight.chunk(3, 1), fused.bias.chunk(3), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Query, key and value side by side, ``(…, 3·n)``."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    inputs, outputs = weight.shape
    found = nn.Linear(inputs, outputs, device="meta", dtype=weight.dtype)
    found.weight = nn.Parameter(weight.detach().mT.clone(memory_format=torch.contiguous_format))
    found.bias = nn.Parameter(bias.detach().clone())
    return found


def split_projections(model: nn.Module) -> int:
    """Put a `SplitProjection` in the place of every fused ``c_attn`` of a model; how many there were.

    An adapter that was trained so is loaded into a model after this call, by peft or whoever.
    """
    fused = [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith("c_attn") and isinstance(module, Conv1D) and module.nf == 3 * module.nx
    ]
    for name, module in fused:
        model.set_submodule(name, SplitProjection(module))
    return len(fused)


def query_and_value(model: nn.Module) -> list[str]:
    """Names (peft's ``target_modules``) of query and value, which are made modules of their own if need be.

    Raises InputError for a model in which they are not to be found apart.
    """
    if split_projections(model):
        return ["q_proj", "v_proj"]
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "weight")}
    for names in QUERY_AND_VALUE:
        if {*names} <= linear:
            return [*names]
    raise InputError(
        "adapter.target: qv: query and value of this model are not found as modules of their own, and its "
        "fused ones are not GPT-2's; name its modules by adapter.target_modules"
    )
