"""Cross entropy over a large vocabulary whose logits never exist whole: exact, in chunks of tokens.

Inside of `Chunked`, the product with a layer's weight that makes logits gives `Logits`, which stands for
them and is not computed. Slices, shapes, types, scales and soft caps are noted; a cross entropy of them is
computed a few tokens at a time, with its gradient and the product of its Hessian. Whatever else is done with
the logits computes them whole, as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flatbench.curvature.operators.chain import chains
from flatbench.curvature.operators.entropy import Entropy, Shape, Spec
from flatbench.labels import IGNORED

#: classes from which on logits are computed in chunks; below, they are small beside a block's activations
LARGE = 4096


class Logits(Tensor):
    """Stands for ``shape(x·Wᵀ + b)``, ``(..., classes)``; any operation that is not known computes it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    form: Shape
    note: Callable[..., None]

    @staticmethod
    def __new__(
        cls, x: Tensor, weight: Tensor, bias: Tensor | None, form: Shape, note: Callable[..., None]
    ) -> Logits:
        """What was given, unmultiplied."""
        made: Logits = Tensor._make_wrapper_subclass(
            cls, (*x.shape[:-1], weight.shape[0]), dtype=form.kind, device=x.device
        )
        made.x, made.weight, made.bias, made.form, made.note = x, weight, bias, form, note
        return made

    def whole(self) -> Tensor:
        """The logits, computed."""
        return self.form.apply(functional.linear(self.x, self.weight, self.bias))[0]

    def _with(self, **changed: Any) -> Logits:
        held = {key: getattr(self, key) for key in ("x", "weight", "bias", "form", "note")}
        return Logits(**{**held, **changed})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("__get__", "size", "dim", "numel", "is_floating_point", "__len__", "ndimension"):
            with torch._C.DisableTorchFunctionSubclass():
                # what it looks like; its numbers are not there to be read
                if name != "__get__" or getattr(func, "__self__", None) in _LOOKS:
                    return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, Logits):
            known: Callable[..., Any] = _KNOWN.get(name, _unknown)
            found = known(first, *args[1:], **_without_input(kwargs))
            if found is not NotImplemented:
                return found
        computed: dict[int, Tensor] = {}

        def compute(each: Logits) -> Tensor:
            if id(each) not in computed:
                each.note(f"whole, for {name or func}")
                computed[id(each)] = each.whole()
            return computed[id(each)]

        args, kwargs = torch.utils._pytree.tree_map_only(Logits, compute, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Reached only by what passed torch functions over: computed whole."""
        args, kwargs = torch.utils._pytree.tree_map_only(Logits, lambda each: each.whole(), (args, kwargs))
        return func(*args, **(kwargs or {}))


_LOOKS = {
    getattr(Tensor, name)
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
}


def _without_input(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key != "input"}


def _unknown(logits: Logits, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented


def _same(logits: Logits, *args: Any, **kwargs: Any) -> Any:
    return logits


def _getitem(logits: Logits, index: Any) -> Any:
    """Rows by slices: what leaves the classes alone."""
    given = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(i, int | slice) and i is not Ellipsis for i in given):
        return NotImplemented
    plain = [i for i in given if i is not Ellipsis]
    reaches = Ellipsis in given or len(plain) == logits.ndim
    if reaches and given[-1] is not Ellipsis and given[-1] != slice(None):
        return NotImplemented
    if len(plain) == logits.ndim and isinstance(given[-1], int):
        return NotImplemented
    return logits._with(x=logits.x[index])


def _view(logits: Logits, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or (len(shape) == 1 and isinstance(shape[0], torch.dtype)):
        return NotImplemented
    wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if len(wanted) < 2 or wanted[-1] not in (logits.weight.shape[0],) or -1 not in wanted[:-1]:
        return NotImplemented
    return logits._with(x=logits.x.reshape(*wanted[:-1], logits.x.shape[-1]))


def _flatten(logits: Logits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim % logits.ndim == logits.ndim - 1:
        return NotImplemented
    end = end_dim % logits.ndim
    return logits._with(x=logits.x.flatten(start_dim, end))


def _to(logits: Logits, *args: Any, **kwargs: Any) -> Any:
    wanted = [*args, *kwargs.values()]
    if len(wanted) != 1 or not isinstance(wanted[0], torch.dtype) or logits.form.capped:
        return logits if wanted in ([logits.device], [logits.device.type]) else NotImplemented
    if not wanted[0].is_floating_point or logits.form.before != 1:
        return NotImplemented
    return logits._with(form=replace(logits.form, kind=wanted[0]))


def _float(logits: Logits) -> Any:
    return logits if logits.form.kind == torch.float32 else _to(logits, torch.float32)


def _double(logits: Logits) -> Any:
    return logits if logits.form.kind == torch.float64 else _to(logits, torch.float64)


def _mul(logits: Logits, other: Any, **kwargs: Any) -> Any:
    if kwargs or isinstance(other, bool) or not isinstance(other, int | float):
        return NotImplemented
    return logits._with(form=logits.form.scaled(float(other)))


def _div(logits: Logits, other: Any, **kwargs: Any) -> Any:
    if kwargs or isinstance(other, bool) or not isinstance(other, int | float) or other == 0:
        return NotImplemented
    return logits._with(form=logits.form.scaled(1 / float(other)))


def _tanh(logits: Logits) -> Any:
    return NotImplemented if logits.form.capped else logits._with(form=replace(logits.form, capped=True))


def _cross_entropy(
    logits: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = IGNORED,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    known = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum")
    if not known or logits.ndim != 2 or target.ndim != 1 or target.is_floating_point():
        return NotImplemented
    kept = (target != ignore_index).nonzero().squeeze(1)
    terms = max(len(kept), 1) if reduction == "mean" else 1
    if not len(kept):  # torch's mean of nothing is no number, and its sum is zero
        return NotImplemented
    x = logits.x if len(kept) == len(target) else logits.x.index_select(0, kept)
    spec = Spec(target[kept], logits.form, float(label_smoothing), 1 / terms)
    logits.note("in chunks of tokens", spec.chunk_bytes(len(logits.weight)))
    apply: Any = Entropy.apply
    made: Tensor = apply(x, logits.weight, logits.bias, spec)
    return made


_KNOWN: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem, "view": _view, "reshape": _view, "flatten": _flatten, "contiguous": _same,
    "to": _to, "float": _float, "double": _double, "mul": _mul, "__mul__": _mul, "__rmul__": _mul,
    "multiply": _mul, "div": _div, "__truediv__": _div, "true_divide": _div, "divide": _div, "tanh": _tanh,
    "cross_entropy": _cross_entropy,
}  # fmt: skip


# -- where logits are made --------------------------------------------------------------------------------


class Chunked(TorchFunctionMode):
    """Lets the products with some weights wait for what is done with them.

    Args:
        weights: identities of the heads' weights, see `heads`.

    Attributes:
        told: how logits were computed: ``in chunks of tokens``, or ``whole`` and for what; empty
            where there were none.
        chunk: bytes of the largest chunk of logits.
    """

    def __init__(self, weights: frozenset[int]) -> None:
        super().__init__()
        self.told, self.chunk = "", 0
        self._weights = weights

    def _note(self, how: str, chunk: int = 0) -> None:
        self.chunk = max(self.chunk, chunk)
        if not self.told.startswith("whole"):  # what was computed once was there
            self.told = how

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear and len(args) > 1 and id(args[1]) in self._weights:
            x, weight, bias = (*args, *kwargs.values(), None)[:3]
            if x.ndim > 1 and x.dtype == weight.dtype:
                return Logits(x, weight, bias, Shape(x.dtype), self._note)
        return func(*args, **kwargs)


def heads(model: nn.Module) -> frozenset[int]:
    """The weights of layers that give `LARGE` or more numbers a token and lie outside of blocks in a row."""
    return frozenset(id(module.weight) for module in _heads(model))


def largest_head(model: nn.Module) -> int:
    """How many numbers the largest of these layers gives a token; 0 where there is none."""
    return max((module.out_features for module in _heads(model)), default=0)


def _heads(model: nn.Module) -> list[nn.Linear]:
    inside = {id(each) for blocks in chains(model) for block in blocks for each in block.modules()}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features >= LARGE and id(module) not in inside
    ]
