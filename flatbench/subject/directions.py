"""Random directions in weight space, scaled to the weights so that slices of different models compare."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from flatbench import sums
from flatbench.errors import NotApplicableError
from flatbench.seeding import derive_seed
from flatbench.subject.objective import norm
from flatbench.subject.spaces import Point

#: ``filter``: each filter has the norm of the weights' filter. ``layer``: each parameter tensor has the norm
#: of the weights. ``none``: one unit vector over the whole space, so that distances are l2 distances.
Normalisation = Literal["filter", "layer", "none"]


def random_direction(point: Point, normalisation: Normalisation, seed: int) -> list[Tensor]:
    """A Gaussian direction over a point's space, normalised.

    Filter normalisation is that of Li et al. 2018 (arXiv 1712.09913, Section 4):
    ``d_ij ← d_ij · ‖w_ij‖ / ‖d_ij‖`` with i the layer and j the filter, and as in their code the directions
    of biases and normalisation weights (parameters of fewer than two dimensions) are zero; so too with
    ``layer``.

    The draw depends on the seed, the parameters' names and their shapes alone, and is made on the CPU: models
    with the same layers, trained differently, are cut along the same directions before scaling.

    Raises NotApplicableError if nothing of the direction is left (a space of vectors only, weights all zero).
    """
    direction = []
    for name, parameter in point.parameters.items():
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        if normalisation == "filter":
            drawn = filter_normalised(drawn, parameter.detach(), filter_axis(point.owners[name]))
        elif normalisation == "layer":
            scale = sums.norm(parameter.detach()) / sums.norm(drawn)
            drawn = drawn * scale if parameter.ndim >= 2 else torch.zeros_like(drawn)
        direction.append(drawn)
    length = norm(direction)
    if length == 0:
        raise NotApplicableError(f"{normalisation}-normalised directions vanish in this space")
    return [part / length for part in direction] if normalisation == "none" else direction


def filter_axis(owner: nn.Module) -> int:
    """The axis of a module's weight that counts its outputs, whose slices are the filters.

    0 for Linear and convolutions; 1 for transformers' Conv1D (GPT-2), which stores ``(inputs, outputs)``, and
    for transposed convolutions. For an embedding it is the row of a token; other tensors are cut along 0.
    """
    return 1 if isinstance(owner, Conv1D | _ConvTransposeNd) else 0


def filter_normalised(direction: Tensor, weight: Tensor, axis: int) -> Tensor:
    """The direction with every slice along ``axis`` scaled to the norm of the weight's slice.

    Zero for parameters of fewer than two dimensions.
    """
    if weight.ndim < 2:
        return torch.zeros_like(direction)
    rest = [i for i in range(weight.ndim) if i != axis]
    wanted = torch.linalg.vector_norm(weight, dim=rest, keepdim=True)
    drawn = torch.linalg.vector_norm(direction, dim=rest, keepdim=True)
    drawn = drawn.clamp_min(torch.finfo(direction.dtype).tiny)
    rescaled: Tensor = direction * (wanted / drawn)
    return rescaled
