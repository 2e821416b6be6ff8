"""The one way into a space: what is measured there is the trained function, and it comes out untouched."""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import pieces
from flatbench.curvature.operators.adapters import adapted_layers, refuse_detached, steady
from flatbench.curvature.operators.fingerprint import fingerprint
from flatbench.curvature.operators.model_state import as_found, plain_attention
from flatbench.curvature.operators.offloaded import put_away_again, refuse_lost, within_reach
from flatbench.curvature.operators.precision import Precision, computed_in, half_types, types_computed
from flatbench.curvature.operators.spaces import Space, parameters_of, plain_name, spanned
from flatbench.errors import FlatbenchError, InputError, ModelChangedError, NotApplicableError, shown

log = logging.getLogger(__name__)

#: most rows on which the loss in a space is compared with the loss outside
ROWS = 4
#: batches that are tried for rows that have terms
_BATCHES = 8
#: models that are in a space now; what enters again leaves the second look at all weights to the first
_INSIDE: weakref.WeakSet[nn.Module] = weakref.WeakSet()

#: the mean loss of some rows of a model, and its terms
RowLoss = Callable[[Any], "tuple[Tensor, int]"]


@contextlib.contextmanager
def entered(
    model: nn.Module,
    space: Space,
    only: Callable[[str], bool] | None = None,
    *,
    loss: RowLoss | None = None,
    batches: Iterable[Any] = (),
    twice_differentiable: bool = False,
    curvature: bool = False,
    precision: Precision = "float32",
) -> Iterator[dict[str, nn.Parameter]]:
    """Lend a model out in a space: evaluation mode, and only the space's parameters, by name, have gradients.

    On entering, the loss of a few rows in the space is compared with their loss outside of it; the adapters'
    layers are merged and untied there, and attention may be another implementation. A model in half precision
    is computed in float32 inside, see `flatbench.curvature.operators.precision.computed_in`; then its loss is
    compared in both precisions first, and outside of the space in float32 too. On leaving, by an
    exception as well, a checksum of every parameter and buffer and who shares them is compared with that at
    the entrance. Price: two forward passes over `ROWS` rows, and two readings of the weights.

    Args:
        loss: of some rows of a batch; without it, or without batches, nothing is compared on entering.
        batches: what to take the rows from: the first that has terms.
        twice_differentiable: use an attention that has second derivatives (torch's fused ones have none).
        curvature: gradients will be differentiated: refuse those that are not the loss's.
        precision: ``float32`` at least, or ``as_stored``.

    Raises:
        NotApplicableError: the loss in the space is not the loss outside; the message has both.
        FlatbenchError: on leaving, something of the model is not as it was.
        And what `flatbench.curvature.operators.spaces.spanned` raises.
    """
    _refuse_inference(model, curvature or twice_differentiable)
    refuse_lost(model)
    _refuse_rewriting(model)
    if isinstance(space, Mapping) and any(p.device.type == "meta" for p in space.values()):
        raise NotApplicableError("a parameter that was given is not in memory: name the space instead")
    with steady(model):
        # the first call in evaluation mode may bring weights back that a training method has moved
        with as_found(model), put_away_again(model):
            outside, rows, runs = _outside_as_stored(model, loss, batches, precision)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_check_left_as_found(model))
            coarse = None if outside is None else _precision(model, torch.float64)
            chosen = () if space == "adapter" else parameters_of(model, space, only).values()
            stack.enter_context(within_reach(model, _to_copy(model, space, only), chosen=chosen))
            moving = [] if precision == "as_stored" else _to_copy(model, space, only)
            wide = stack.enter_context(computed_in(model, precision, moving))
            if wide is not None and loss is not None:
                if not runs:
                    with as_found(model):
                        outside, rows = _outside(model, loss, batches)
                elif outside is not None and coarse is not None:
                    outside = _in_float32(model, loss, rows, outside, coarse)
            stack.enter_context(as_found(model))
            parameters = stack.enter_context(spanned(model, space, only))
            if curvature or twice_differentiable:
                refuse_detached(model, parameters.values())
            if twice_differentiable:
                stack.enter_context(plain_attention(model))
            if loss is not None and outside is not None:
                with torch.no_grad():
                    value, _ = _with_random_state(lambda: loss(rows))
                kind = _precision(model, value.dtype)
                if not _close(outside, float(value), kind):
                    with torch.no_grad(), types_computed() as found:
                        loss(rows)
                    kind = _coarser(kind, found)
                    if not _close(outside, float(value), kind):
                        raise NotApplicableError(_differs(outside, float(value), space, kind))
            yield parameters


@contextlib.contextmanager
def _check_left_as_found(model: nn.Module) -> Iterator[None]:
    if model in _INSIDE:
        yield
        return
    _INSIDE.add(model)
    try:
        before = fingerprint(model)
        try:
            yield
        except Exception as error:
            changes = before.changes(fingerprint(model))
            if changes:
                raise ModelChangedError(_change_message(changes)) from error
            raise
        changes = before.changes(fingerprint(model))
        if changes:
            raise ModelChangedError(_change_message(changes))
    finally:
        _INSIDE.discard(model)


def _refuse_inference(model: nn.Module, gradients: bool) -> None:
    """Raise InputError in ``torch.inference_mode`` where gradients are needed, and for weights made in it."""
    if gradients and torch.is_inference_mode_enabled():
        raise InputError(
            "there are no gradients inside torch.inference_mode(): leave it (no_grad does no harm)"
        )
    if any(p.is_inference() for p in model.parameters()):
        raise InputError("the model's weights were made inside torch.inference_mode() and have no gradients")


def _refuse_rewriting(model: nn.Module) -> None:
    """Raise NotApplicableError for a model whose forward pass writes to its weights."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise NotApplicableError(
                f"{plain_name(name)} has a max_norm: each look-up rewrites its weight, and the loss is no "
                "function of it"
            )


def _change_message(changes: list[str]) -> str:
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return (
        f"the model is not as it was before it was measured: {'; '.join(changes[:3])}{more}; load its "
        "weights again"
    )


def _to_copy(model: nn.Module, space: Space, only: Callable[[str], bool] | None) -> list[nn.Parameter]:
    """The parameters that move in a space, and those of the layers whose adapters are merged in it."""
    found = list(parameters_of(model, space, only).values())
    if space != "adapter" and not isinstance(space, Mapping):
        found += [p for layer in adapted_layers(model).values() for p in layer.parameters()]
    return found


def _outside_as_stored(
    model: nn.Module, loss: RowLoss | None, batches: Iterable[Any], precision: Precision
) -> tuple[float | None, Any, bool]:
    """`_outside` in the model's own precision, and whether it runs in that."""
    try:
        return (*(_outside(model, loss, batches) if loss else (None, None)), True)
    except (RuntimeError, FlatbenchError) as error:
        mixed = precision != "as_stored" and half_types(model)
        if not mixed or isinstance(error, torch.OutOfMemoryError):
            raise
        # a head in float32 on a base in half precision, which runs under autocast alone
        log.info("the model runs in float32 alone: %s", error)
        return None, None, False


def _outside(
    model: nn.Module, loss: RowLoss, batches: Iterable[Any]
) -> tuple[float, Any] | tuple[None, None]:
    """The loss of a few rows at the model as it was found, and the rows; None where there are no terms."""
    for _, batch in zip(range(_BATCHES), batches, strict=False):
        if not cutting.rows(batch):
            continue
        for rows in (pieces.sample_of(batch, ROWS), batch):
            try:
                value, terms = _evaluate(model, loss, rows)
            except (RuntimeError, ValueError, IndexError, FlatbenchError):
                if rows is batch:
                    raise
                continue  # a loss that a part of a batch does not have
            if terms:
                return float(value), rows
            break
    return None, None


def _in_float32(model: nn.Module, loss: RowLoss, rows: Any, stored: float, kind: torch.dtype) -> float:
    """The loss of the rows in float32, which is compared with that in the model's own precision."""
    with as_found(model):
        try:
            value = float(_evaluate(model, loss, rows)[0])
        except (RuntimeError, TypeError, InputError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotApplicableError(
                f"the model cannot be computed in float32 ({shown(' '.join(str(error).split()), 200)}); "
                "measure it with precision 'as_stored'"
            ) from error
    if math.isfinite(stored) and not _close(stored, value, kind):
        raise NotApplicableError(
            f"the model is another function in float32: its loss on a few rows is {value:.6g} there and "
            f"{stored:.6g} as it is stored, and {str(kind).removeprefix('torch.')} allows a share of "
            f"{tolerance(kind):.0e}; measure it with precision 'as_stored'"
        )
    return value


def _evaluate(model: nn.Module, loss: RowLoss, rows: Any) -> tuple[Tensor, int]:
    with torch.no_grad():
        try:
            return _with_random_state(lambda: loss(rows))
        except (RuntimeError, ValueError, FlatbenchError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # an attention kernel that this machine lacks is replaced in the space, with no comparison
            with plain_attention(model):
                found = _with_random_state(lambda: loss(rows))
            log.info("the model's own attention does not run here (%s): compared with plain attention", error)
            return found


def _with_random_state(work: Callable[[], tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """What ``work`` finds from the random state as it is; the state is left as it was."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        return work()


def _precision(model: nn.Module, loss: torch.dtype) -> torch.dtype:
    """The coarsest type that takes part: of the parameters, the loss, and autocast."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1}
    kinds |= {loss} if loss.is_floating_point else set()
    if any(not p.is_floating_point() or p.dtype.itemsize == 1 for p in model.parameters()):
        kinds.add(torch.bfloat16)  # quantised weights are computed with in half precision
    return _coarser(torch.float64, kinds | half_types(model))


def tolerance(kind: torch.dtype) -> float:
    """Relative difference that rounding, also of merged weights, may make of a loss in a precision."""
    return {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3}.get(kind, 2e-2)


def _close(outside: float, inside: float, kind: torch.dtype) -> bool:
    if not (math.isfinite(outside) and math.isfinite(inside)):  # what is measured then says so
        return bool(outside == inside) or (math.isnan(outside) and math.isnan(inside))
    return abs(outside - inside) <= tolerance(kind) * (abs(outside) + float(torch.finfo(kind).eps ** 0.2))


def _coarser(kind: torch.dtype, others: set[torch.dtype]) -> torch.dtype:
    return max({kind, *others}, key=lambda each: torch.finfo(each).eps)


def _differs(outside: float, inside: float, space: Space, kind: torch.dtype) -> str:
    called = f"'{space}'" if isinstance(space, str) else "of the given names"
    return (
        f"in the space {called} the model is another function: its loss on the same few rows is {inside:.6g} "
        f"there and {outside:.6g} outside, and {str(kind).removeprefix('torch.')} allows a share of "
        f"{tolerance(kind):.0e}; an adapter that cannot be merged exactly, or a weight that is shared in a "
        "way that is not seen; measure in the space 'adapter'"
    )
