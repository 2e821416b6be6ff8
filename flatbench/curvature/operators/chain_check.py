"""Check that a chain of blocks is the model's function, against the whole graph on a few tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.blockwise import Blockwise
from flatbench.curvature.operators.chain import NoChain
from flatbench.curvature.operators.graphs import Before, Graph
from flatbench.errors import FlatbenchError, InputError
from flatbench.labels import IGNORED

#: rows, and of each so many tokens
ROWS, TOKENS = 2, 24


def few_tokens(pieces: Sequence[Any]) -> list[Any]:
    """Batches to try in turn: a few rows, first with a few of their tokens, if they have some, then whole.

    The whole graph of a large model would not fit over more.
    """
    found = []
    for piece in pieces[:4]:
        rows = planning.sample_of(piece, ROWS)
        window = _window(rows)
        found += [rows] if window is None else [window, rows]
    return found


def _window(rows: Any) -> Any | None:
    """Some tokens of the rows, with labels among them; None where the rows are no tokens, or few."""
    ids = rows.get("input_ids") if isinstance(rows, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] <= TOKENS:
        return None
    length, labels = ids.shape[1], rows.get("labels")
    start = 0
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        counted = (labels != IGNORED).sum(dim=0).cumsum(dim=0)
        ends = counted[TOKENS - 1 :]
        before = torch.cat([counted.new_zeros(1), counted[: length - TOKENS]])
        start = int((ends - before).argmax())

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim >= 2 and tensor.shape[:2] == ids.shape:
            return tensor[:, start : start + TOKENS].contiguous()
        return tensor

    return cutting.transformed(rows, cut)


def differs(
    build: Callable[[Any, Before], Graph | None],
    plainly: Callable[[Any], tuple[Graph | None, torch.dtype]],
    blocks: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    *,
    gauss_newton: bool,
) -> str:
    """How the chain's loss, gradient, or product with a vector differs from the whole graph's; or empty.

    Args:
        batches: tried in turn, until one has terms and the model takes it.
        plainly: the whole graph of a batch, computed in the plainest way, and the type of its loss.

    Raises NoChain where the blocks do not follow one another, or cannot be computed by themselves.
    """
    for batch in batches:
        try:
            whole, kind = plainly(batch)
        except (InputError, FlatbenchError):
            continue  # tokens that were cut out of their sentence, in a model that minds
        if whole is not None:
            break
    else:
        raise NoChain("no few rows to check it on")
    vectors = _vectors(parameters)
    expected = whole.product(vectors, keep=False)
    gradients, loss = [None if g is None else g.detach() for g in whole.gradients], whole.loss
    del whole
    made = _built(build, batch, blocks, parameters, gauss_newton)
    allowed = max(float(torch.finfo(k).eps) for k in (kind, *(p.dtype for p in parameters))) ** 0.5
    if not abs(made.loss - loss) <= allowed * max(abs(loss), allowed):
        return f"its loss on a few rows is {made.loss:.6g} by blocks, and {loss:.6g}"
    off = _distance(made.gradients, gradients)
    if not off <= allowed:
        return f"its gradient by blocks is off by {off:.1e} of its norm"
    off = _distance(made.product(vectors, keep=False), expected)
    return "" if off <= allowed else f"a product by blocks is off by {off:.1e} of its norm"


def _built(
    build: Callable[[Any, Before], Graph | None],
    batch: Any,
    blocks: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    gauss_newton: bool,
) -> Blockwise:
    try:
        made = Blockwise.built(
            lambda before: build(batch, before), blocks, parameters, gauss_newton=gauss_newton
        )
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, InputError) as error:
        raise NoChain(f"a block cannot be called by itself ({' '.join(str(error).split())[:120]})") from error
    if made is None:
        raise NoChain("no few rows to check it on")
    return made


def _vectors(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p) for p in parameters]


def _distance(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """Relative to the norm of what is expected."""
    off, size = 0.0, 0.0
    for one, other in zip(found, expected, strict=True):
        if other is not None:
            size += float(other.double().square().sum())
        if one is not None or other is not None:
            gap = one if other is None else other if one is None else one.detach() - other.detach()
            off += float(gap.double().square().sum())  # type: ignore[union-attr]
    return math.sqrt(off / size) if size else math.sqrt(off)
