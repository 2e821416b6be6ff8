"""Check that a chain of blocks is the model's function, against the whole graph on a few tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.blockwise import Blockwise
from flatbench.curvature.operators.chain import NoChain
from flatbench.curvature.operators.graphs import Before, Graph, lacks_second_derivative
from flatbench.curvature.operators.memory import TooLarge
from flatbench.errors import FlatbenchError, InputError
from flatbench.labels import IGNORED

#: rows, and tokens per row
ROWS, TOKENS = 2, 24
#: bytes that the whole logits of these tokens may take, of which a graph holds about twenty; and the fewest
#: tokens of a row
_LOGITS, _FEWEST = 4_000_000, 4


#: of a batch: loss, gradients by parameter, their product with vectors (None where none are given), and the
#: type of the loss; None for a loss without terms
Compared = tuple[float, Sequence[Tensor | None], Sequence[Tensor | None] | None, torch.dtype]
Plainly = Callable[[Any, Sequence[Tensor] | None], Compared | None]


def few_tokens(pieces: Sequence[Any], classes: int = 0) -> list[Any]:
    """Batches to try in turn: a few rows, first with a few of their tokens, if they have some, then whole,
    then one of them.

    The whole graph of a large model would not fit over more.

    Args:
        classes: words of a vocabulary whose logits are computed whole here.
    """
    tokens = max(min(TOKENS, _LOGITS // (4 * ROWS * max(classes, 1))), _FEWEST)
    found = []
    for piece in pieces[:4]:
        rows = planning.sample_of(piece, ROWS)
        window = _window(rows, tokens)
        found += [rows] if window is None else [window, rows]
        if cutting.rows(rows) > 1:
            found.append(planning.sample_of(piece, 1))
    return found


def _window(rows: Any, tokens: int) -> Any | None:
    """Some tokens of the rows, with labels among them; None where the rows are no tokens, or few."""
    ids = rows.get("input_ids") if isinstance(rows, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] <= tokens:
        return None
    length, labels = ids.shape[1], rows.get("labels")
    start = 0
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        counted = (labels != IGNORED).sum(dim=0).cumsum(dim=0)
        ends = counted[tokens - 1 :]
        before = torch.cat([counted.new_zeros(1), counted[: length - tokens]])
        start = int((ends - before).argmax())

    def cut(tensor: Tensor) -> Tensor:
        if tensor.ndim >= 2 and tensor.shape[:2] == ids.shape:
            return tensor[:, start : start + tokens].contiguous()
        return tensor

    return cutting.transformed(rows, cut)


def differs(
    build: Callable[[Any, Before], Graph | None],
    plainly: Plainly,
    blocks: Sequence[nn.Module],
    parameters: Sequence[nn.Parameter],
    batches: Sequence[Any],
    *,
    gauss_newton: bool,
    counted: Callable[[float], AbstractContextManager[Any]] = contextlib.nullcontext,
    limit: float = math.inf,
) -> str:
    """How the chain's loss, gradient, or product with a vector differs from the whole graph's; or empty.

    Args:
        batches: tried in turn, until one has terms and the model takes it.
        plainly: computes what is compared by the whole graph, in the plainest way.
        counted: counts memory while whole graphs are there, up to a limit.
        limit: where every batch's graph takes more, loss and gradient alone are compared, for the smallest.

    Raises NoChain where the blocks do not follow one another, or cannot be computed by themselves.
    """
    vectors, large = _vectors(parameters), []
    found = None
    for batch in batches:
        try:
            with counted(limit):
                found = plainly(batch, vectors)
        except TooLarge:
            large.append(batch)
        except (InputError, FlatbenchError):
            continue  # tokens that were cut out of their sentence, in a model that minds
        if found is not None:
            break
    if found is None and large:  # an image cannot be cut, and its gradient takes less than a product
        batch = min(large, key=lambda each: cutting.size_of([each]))
        with counted(math.inf):
            found = plainly(batch, None)
    if found is None:
        raise NoChain("no few rows to check it on")
    loss, gradients, expected, kind = found
    made = _built(build, batch, blocks, parameters, gauss_newton)
    allowed = max(float(torch.finfo(k).eps) for k in (kind, *(p.dtype for p in parameters))) ** 0.5
    if not abs(made.loss - loss) <= allowed * max(abs(loss), allowed):
        return f"its loss on a few rows is {made.loss:.6g} by blocks, and {loss:.6g}"
    off = _distance(made.gradients, gradients)
    if not off <= allowed:
        return f"its gradient by blocks is off by {off:.1e} of its norm"
    if expected is None:
        return ""
    try:
        off = _distance(made.product(vectors, keep=False), expected)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or lacks_second_derivative(error):
            raise
        raise NoChain(f"a product by blocks fails: {' '.join(str(error).split())[:200]}") from error
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
