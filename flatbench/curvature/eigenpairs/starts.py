"""Starts of a Krylov space from approximate eigenvectors, with noise in which a bound can be read."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.errors import InputError
from flatbench.sums import lengths

#: length of the noise, relative to the given vectors: what they lack must stay within reach
NOISE = 0.1
#: entries of the given vectors that tell them from others
_SAMPLE = 4096


def checked(start: Tensor, operator: SymmetricOperator) -> Tensor:
    """Given vectors as ``(n, m)`` in the operator's precision. Raises InputError if they do not fit it."""
    given = start.reshape(len(start), -1)
    if len(given) != operator.dimension or not bool(torch.isfinite(given).all()):
        raise InputError(
            f"start: needs finite vectors of length {operator.dimension}, not {tuple(start.shape)}"
        )
    return given.to(dtype=operator.dtype, device=operator.device)


def fingerprint(given: Tensor) -> int:
    """A number that differs from one set of vectors to another."""
    sample = given.flatten()[:: max(1, given.numel() // _SAMPLE)].detach().cpu().contiguous()
    return zlib.crc32(sample.double().numpy().tobytes())


def mixed(given: Tensor, noise: Tensor) -> Tensor:
    """A mixture of the given vectors ``(n, m)`` for each column of noise ``(n, p)``, and the noise."""
    count = noise.shape[1]
    mixtures = torch.stack([given[:, i::count].sum(dim=1) for i in range(count)], dim=1)
    mixed: Tensor = mixtures + noise * (NOISE * lengths(mixtures) / lengths(noise))
    return mixed
