"""The precision in which a model is measured: float32 at least, through a copy, or as it is stored."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import memory
from flatbench.curvature.operators.adapters import adapted_layers, attentions
from flatbench.curvature.operators.losses import HALF, device_types
from flatbench.curvature.operators.widened import Deferred, Widened
from flatbench.errors import InputError

log = logging.getLogger(__name__)

#: ``float32``: what is stored or computed in half precision is measured in float32; what has more keeps it.
#: ``as_stored``: weights, autocast and all else as they are
Precision = Literal["float32", "as_stored"]

#: share of the memory that copies of all weights may take; above it, frozen ones are widened as they are used
SHARE = 0.5
#: operations that torch calls pointwise and that copy numbers, and parts of the names of those that sum them
_COPIES = {
    "_to_copy",
    "clone",
    "copy",
    "copy_",
    "where",
    "masked_fill",
    "masked_fill_",
    "fill",
    "fill_",
    "zero_",
}
_SUMS = ("mm", "conv", "attention", "softmax", "norm", "sum", "mean", "linear", "dot", "matmul", "mv")
#: units in the last place of half precision by which a product may be off
UNITS = 4
#: where torch may compute products of float32 in fewer bits
_TORCH: Any = torch.backends
_MATMULS = (_TORCH.cuda.matmul, _TORCH.cudnn.conv, _TORCH.mkldnn.matmul)

_WIDE: weakref.WeakKeyDictionary[nn.Module, Widening] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Widening:
    """How a model is widened.

    Attributes:
        stored: the types of less precision that were found, by name.
        copies: bytes of the weights' copies.
        layerwise: bytes that copies of the other weights would take, which are widened as they are used.
    """

    stored: str
    copies: int
    layerwise: int

    def describe(self) -> str:
        """One sentence on the memory."""
        rest = f"; {memory.readable(self.layerwise)} more layer by layer" if self.layerwise else ""
        return f"stored in {self.stored}, computed in float32: copies of {memory.readable(self.copies)}{rest}"


def check_precision(precision: str) -> None:
    """Raise InputError for a precision that is none of `Precision`."""
    if precision not in get_args(Precision):
        raise InputError(f"precision: '{precision}' is none of {', '.join(get_args(Precision))}")


def widening_of(model: nn.Module) -> Widening | None:
    """How a model is widened now; None if it is not."""
    return _WIDE.get(model)


def half_types(model: nn.Module) -> set[torch.dtype]:
    """The types of half precision in which a model is computed: of weights, autocast, quantised layers."""
    found = {p.dtype for p in model.parameters()} | {
        getattr(m, "compute_dtype", None) for m in model.modules()
    }
    for device in device_types(model):
        if torch.is_autocast_enabled(device):
            found.add(torch.get_autocast_dtype(device))
    if _autocast_of_accelerate(model):
        found.add(torch.bfloat16)
    return {kind for kind in found if kind in HALF}


def named(kinds: Iterable[torch.dtype]) -> str:
    """Types by name."""
    return ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))


def why_coarse(kinds: Collection[torch.dtype]) -> str:
    """What a message says where half precision may be the cause; empty where it takes no part."""
    if not kinds:
        return ""
    found = named(kinds)
    return f"; it is computed in {found}, whose rounding may be the cause: measure with precision 'float32'"


def unit_of_half(kinds: Collection[torch.dtype]) -> float:
    """The distance of 1 to the next number in the coarsest of some types; 0 without one."""
    return max((float(torch.finfo(kind).eps) for kind in kinds), default=0.0)


@contextlib.contextmanager
def types_computed(arithmetic: bool = False) -> Iterator[set[torch.dtype]]:
    """The floating-point types of all that is computed inside, as it is known at the end.

    Args:
        arithmetic: of what rounds alone, and not of copies, views and look-ups.
    """
    mode = _Types(arithmetic)
    with mode:
        yield mode.found


class _Types(TorchDispatchMode):
    def __init__(self, arithmetic: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self.arithmetic, self.found = arithmetic, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not self.arithmetic or _rounds(func):
            for each in made if isinstance(made, tuple | list) else (made,):
                if isinstance(each, Tensor) and each.is_floating_point() and each.dtype.itemsize > 1:
                    self.found.add(each.dtype)
        return made


def _rounds(operation: Any) -> bool:
    """Whether an operation of torch computes new numbers: element by element, or sums of products."""
    name = operation.name().partition("::")[2].partition(".")[0]
    if name in _COPIES or operation.is_view:
        return False
    return torch.Tag.pointwise in operation.tags or any(part in name for part in _SUMS)


# -- in single precision -------------------------------------------------------------------------------------


@contextlib.contextmanager
def computed_in(
    model: nn.Module, precision: Precision, moving: Iterable[nn.Parameter] = ()
) -> Iterator[Widening | None]:
    """Inside, a model is computed in a precision; afterwards it holds its own tensors, never written to.

    With ``float32``: parameters and buffers of less are float32, autocast is off, and so is what lets
    products of float32 be taken in fewer bits (TF32). Quantised weights stay, and are computed with in
    float32 where their layer says in which type it computes. A model that has nothing of less is left alone.

    Args:
        moving: parameters that will be moved, or merged with their adapters, which need copies.

    Gives how it was widened, None if it was not. Raises InputError for another precision.
    """
    check_precision(precision)
    if precision == "as_stored":
        yield None
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_full_products())
        autocast = stack.enter_context(without_autocast(model))
        found = stack.enter_context(widened(model, torch.float32, moving))
        if found is None and autocast:
            found = Widening("autocast", 0, 0)
        if found is not None and model not in _WIDE:
            log.info("%s", found.describe())
            _WIDE[model] = found
            stack.callback(_WIDE.pop, model, None)
        yield found


@contextlib.contextmanager
def widened(
    model: nn.Module, kind: torch.dtype, moving: Iterable[nn.Parameter] = ()
) -> Iterator[Widening | None]:
    """Inside, parameters and buffers with fewer bits than ``kind`` are of that type, and inputs too.

    Parameters stay the same objects with other data, but for those that are widened as they are used.
    """
    tensors = _unique([*model.parameters(), *model.buffers()])
    narrow = [t for t in tensors if _narrow(t, kind)]
    layers: Any = [m for m in model.modules() if getattr(m, "compute_dtype", None) in HALF]
    if not narrow and not layers:
        yield None
        return
    kinds = {_stored_type(t) for t in narrow} | {m.compute_dtype for m in layers}
    later = _to_widen_later(model, narrow, tensors, kind, moving)
    now = [t for t in narrow if id(t) not in later]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(setattr, layer, "compute_dtype", layer.compute_dtype)
            layer.compute_dtype = kind
        hook = model.register_forward_pre_hook(_Inputs(kind), with_kwargs=True, prepend=True)
        stack.callback(hook.remove)
        stack.enter_context(_lent(now, kind))
        stack.enter_context(_replace_weights(model, later, kind))
        yield Widening(named(kinds), _bytes(now, kind), _bytes(later.values(), kind))


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def _stored_type(tensor: Tensor) -> torch.dtype:
    return tensor.stored.dtype if isinstance(tensor, Widened) else tensor.dtype


def _narrow(tensor: Tensor, kind: torch.dtype) -> bool:
    """Whether a tensor holds numbers of fewer bits; packed ones (a type of their own, bytes) do not."""
    plain = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, Deferred)
    floating = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return plain and floating and tensor.dtype.itemsize < kind.itemsize and tensor.device.type != "meta"


def _bytes(tensors: Iterable[Tensor], kind: torch.dtype) -> int:
    return sum(t.numel() * kind.itemsize for t in tensors)


class _Inputs:
    """Widens what a model is called with."""

    def __init__(self, kind: torch.dtype) -> None:
        self.kind = kind

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        def change(tensor: Tensor) -> Tensor:
            return tensor.to(self.kind) if _narrow(tensor, self.kind) else tensor

        return cutting.transformed(args, change), cutting.transformed(kwargs, change)


def _place(tensor: Tensor) -> Hashable:
    plain = tensor.layout == torch.strided and not isinstance(tensor, Deferred) and tensor.numel()
    return (tensor.device, tensor.untyped_storage().data_ptr()) if plain else id(tensor)


@contextlib.contextmanager
def _lent(tensors: list[Tensor], kind: torch.dtype) -> Iterator[None]:
    """Inside, the tensors' data are of another type; those that lie in one memory still do."""
    together: dict[Hashable, list[Tensor]] = {}
    for tensor in tensors:
        together.setdefault((_place(tensor), tensor.dtype), []).append(tensor)
    originals = [(tensor, tensor.data, tensor.grad) for tensor in tensors]
    try:
        for tensor in tensors:  # a gradient has the type of its tensor
            tensor.grad = None
        for shared in together.values():
            if len(shared) == 1:
                shared[0].data = shared[0].data.to(kind)
                continue
            first = min(int(t.storage_offset()) for t in shared)
            last = max(int(t.storage_offset()) + _length(t) for t in shared)
            whole = shared[0].data.as_strided((last - first,), (1,), first).to(kind)
            for tensor in shared:
                offset = int(tensor.storage_offset()) - first
                tensor.data = whole.as_strided(tensor.shape, tensor.stride(), offset)
        yield
    finally:
        for tensor, data, gradient in originals:
            tensor.data, tensor.grad = data, gradient


def _length(tensor: Tensor) -> int:
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _to_widen_later(
    model: nn.Module,
    narrow: list[Tensor],
    tensors: list[Tensor],
    kind: torch.dtype,
    moving: Iterable[nn.Parameter],
) -> dict[int, Tensor]:
    """What is widened as it is used, by identity: frozen weights alone in their memory, if all are many."""
    found: dict[int, Tensor] = {id(t): t for t in narrow if isinstance(t, Deferred)}
    if not narrow or _bytes(narrow, kind) <= SHARE * memory.default_budget(narrow[0].device):
        return found
    kept = {id(p) for p in moving} | {id(b) for b in model.buffers()}
    # what puts parameters back by itself, or is made of one, needs them to be what they are
    by_itself = [*attentions(model).values()]
    by_itself += [layer for layer in adapted_layers(model).values() if hasattr(layer, "parameter_name")]
    kept |= {id(p) for layer in by_itself for p in layer.parameters()}
    places = Counter(map(_place, tensors))
    return found | {id(t): t for t in narrow if id(t) not in kept and places[_place(t)] == 1}


@contextlib.contextmanager
def _replace_weights(model: nn.Module, later: dict[int, Tensor], kind: torch.dtype) -> Iterator[None]:
    """Inside, a tensor that is widened as it is used stands wherever one of these parameters did."""
    made: dict[int, nn.Parameter] = {}
    taken: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in later:
                    narrow = parameter.stored if isinstance(parameter, Widened) else parameter.detach()
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(Widened(narrow, kind), requires_grad=False)
                    taken.append((module._parameters, key, parameter))
        for parameters, key, parameter in taken:
            parameters[key] = made[id(parameter)]
        yield
    finally:
        for parameters, key, parameter in taken:
            parameters[key] = parameter


# -- what torch does beside ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """Inside, matrix products and convolutions of float32 are computed in float32, not in TF32 or less."""
    before = [(backend, backend.fp32_precision) for backend in _MATMULS]
    try:
        for backend, how in before:
            if how in ("tf32", "bf16"):
                backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, how in before:
            if how in ("tf32", "bf16"):
                backend.fp32_precision = how


@contextlib.contextmanager
def without_autocast(model: nn.Module) -> Iterator[bool]:
    """Inside, neither torch's autocast nor accelerate's is on; gives whether one was."""
    devices = device_types(model)
    with contextlib.ExitStack() as stack:
        found = False
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
                found = True
        if _autocast_of_accelerate(model):
            own = vars(model)["forward"]
            stack.callback(vars(model).__setitem__, "forward", own)
            vars(model)["forward"] = vars(model)["_original_forward"]
            found = True
        yield found


def _autocast_of_accelerate(model: nn.Module) -> bool:
    """Whether accelerate has put autocast around the forward pass; it keeps what was there before."""
    own = vars(model).get("forward")
    return "_original_forward" in vars(model) and str(getattr(own, "__module__", "")).startswith("accelerate")


class Exactly(TorchFunctionMode):
    """Inside, what a model asks for in less precision than ``kind`` it gets in this (``x.float()``)."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.kind = kind
        self._narrower = {k for k in (*HALF, torch.float32) if k.itemsize < kind.itemsize}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].to(self.kind)
        if func is not Tensor.view:  # which reads the same bits as another type
            args = [self._raise_type(value) for value in args]
            kwargs = {key: self._raise_type(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _raise_type(self, value: Any) -> Any:
        return self.kind if isinstance(value, torch.dtype) and value in self._narrower else value
