"""A tensor that is stored in few bits and takes part in every operation as if it had more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten

#: operations that only look at a tensor differently: done where it is stored
_VIEWS = {
    _aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.detach.default, _aten.alias.default,
    _aten.view.default, _aten._unsafe_view.default, _aten.slice.Tensor, _aten.select.int,
    _aten.unsqueeze.default, _aten.squeeze.dim, _aten.expand.default, _aten.as_strided.default,
}  # fmt: skip


class Widened(Tensor):
    """A frozen weight that is widened anew by each operation that reads it, forward and backward.

    A graph that saves it holds the narrow weight. So a model whose copy in float32 would not fit is computed
    in float32 a layer at a time, backward passes of any order included.

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

    # what torch functions are made of arrives below; nothing is lost by not looking at them
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Widened):
            if func in _VIEWS:
                return Widened(func(first.stored, *args[1:], **kwargs), first.dtype)
            if func is _aten.embedding.default:  # the rows that are looked up, not all of them
                return func(first.stored, *args[1:], **kwargs).to(first.dtype)
        wide = torch.utils._pytree.tree_map_only(Widened, lambda held: held.stored.to(held.dtype), args)
        named = torch.utils._pytree.tree_map_only(Widened, lambda held: held.stored.to(held.dtype), kwargs)
        return func(*wide, **named)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Widened({tuple(self.shape)}, {self.stored.dtype} as {self.dtype})"
