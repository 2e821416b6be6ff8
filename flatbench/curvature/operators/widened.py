"""Frozen weights that are made anew by each operation that reads them: stored in fewer bits, or on a disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatbench.curvature.operators import memory

_aten: Any = torch.ops.aten

#: operations that only look at a tensor differently: done where it is stored
_VIEWS = {
    _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.detach.default, _aten.alias.default,
    _aten.view.default, _aten._unsafe_view.default, _aten.slice.Tensor, _aten.select.int,
    _aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default, _aten.as_strided.default,
}  # fmt: skip


class Deferred(Tensor):
    """A frozen weight that is made anew by each operation that reads it, forward and backward.

    A graph that saves it holds nothing of it but how it is made.
    """

    # what torch functions are made of arrives below; nothing is lost by not looking at them
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def made(self) -> Tensor:
        """The weight itself."""
        raise NotImplementedError

    def viewed(self, func: Any, args: Any, kwargs: Any) -> Deferred:
        """The same, looked at differently."""
        raise NotImplementedError

    def looked_up(self, args: Any, kwargs: Any) -> Tensor:
        """Rows of it, as `torch.nn.functional.embedding` gives them."""
        return _aten.embedding.default(self.made(), *args, **kwargs)  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raises RuntimeError for what would write to it."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Deferred):
            if func in _VIEWS:
                return first.viewed(func, args[1:], kwargs)
            if func is _aten.embedding.default:
                return first.looked_up(args[1:], kwargs)
        _refuse_writing(func, args)
        args, kwargs = torch.utils._pytree.tree_map_only(Deferred, lambda held: held.made(), (args, kwargs))
        return func(*args, **kwargs)


def _refuse_writing(func: Any, args: Any) -> None:
    if func._schema.is_mutable:
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if isinstance(value, Deferred) and argument.alias_info and argument.alias_info.is_write:
                raise RuntimeError(f"{func} would write to a frozen weight: {value!r}")


class Widened(Deferred):
    """A weight that is stored in few bits and takes part in every operation as if it had more.

    So a model whose copy in float32 would not fit is computed in float32 a layer at a time, backward passes
    of any order included.

    Attributes:
        stored: what is read and widened; never written to.
    """

    stored: Tensor

    @staticmethod
    def __new__(cls, narrow: Tensor, kind: torch.dtype) -> Widened:
        """A tensor that shows itself in another type."""
        made: Widened = Tensor._make_wrapper_subclass(
            cls,
            narrow.shape,
            strides=narrow.stride(),
            storage_offset=narrow.storage_offset(),
            dtype=kind,
            device=narrow.device,
        )
        made.stored = narrow
        return made

    def made(self) -> Tensor:
        """The weight in the wider type."""
        return self.stored.to(self.dtype)

    def viewed(self, func: Any, args: Any, kwargs: Any) -> Widened:
        """The same, looked at differently."""
        return Widened(func(self.stored, *args, **kwargs), self.dtype)

    def looked_up(self, args: Any, kwargs: Any) -> Tensor:
        """The rows that are looked up, widened; not all of them."""
        return _aten.embedding.default(self.stored, *args, **kwargs).to(self.dtype)  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Widened({tuple(self.shape)}, {self.stored.dtype} as {self.dtype})"


class Offloaded(Deferred):
    """A weight that lies elsewhere, mostly on a disk, and is read by each operation that takes part in.

    Attributes:
        read: gives it; what it gives is never written to.
        meta: its shape and strides, without numbers, after all views.
        views: how what is read is looked at.
    """

    read: Callable[[], Tensor]
    meta: Tensor
    views: tuple[tuple[Any, Any, Any], ...]

    @staticmethod
    def __new__(
        cls,
        read: Callable[[], Tensor],
        meta: Tensor,
        device: torch.device,
        views: tuple[tuple[Any, Any, Any], ...] = (),
    ) -> Offloaded:
        """A tensor that shows itself on the device where it will be computed with."""
        made: Offloaded = Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        made.read, made.meta, made.views = read, meta, views
        return made

    def made(self) -> Tensor:
        """The weight, read."""
        found = self.read().to(self.device)
        memory.count(found)
        for func, args, kwargs in self.views:
            found = func(found, *args, **kwargs)
        return found

    def viewed(self, func: Any, args: Any, kwargs: Any) -> Offloaded:
        """The same, looked at differently."""
        views = (*self.views, (func, args, kwargs))
        return Offloaded(self.read, func(self.meta, *args, **kwargs), self.device, views)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Offloaded({tuple(self.shape)}, {self.dtype}, computed on {self.device})"
