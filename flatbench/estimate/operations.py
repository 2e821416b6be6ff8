"""A model's operations counted from shapes alone: no weight is read and no matrix product is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flatbench.curvature.operators.model_state import as_found, plain_attention
from flatbench.measures.cost import flops_per_example
from flatbench.subject.objective import rows
from flatbench.subject.subject import Subject

Batch = Mapping[str, Tensor]


class RealIntegers(TorchDispatchMode):
    """Computes with integers as ever while everything else is a shape.

    Models of images and text read numbers out of their inputs (how many rows of pixels a picture has), which
    decide the shapes; these numbers are there.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _has_integers(func, args, kwargs):
            if func is torch.ops.aten.index.Tensor:
                args = (args[0], _places(args[1]))
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with masks that are there as the places that they choose: how many decides a shape."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _has_integers(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) for tensor in tensors)
    dtype = kwargs.get("dtype")
    if dtype is None:  # what torch makes by itself is of floats, but for ranges between integers
        ranges = func.overloadpacket.__name__ == "arange"
        return ranges and all(isinstance(end, int) for end in args)
    return not dtype.is_floating_point and not dtype.is_complex


def operations(
    model: nn.Module, batches: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> tuple[float, float]:
    """Floating-point operations per example of one gradient, and of one forward pass without it.

    Counted as `flatbench.measures.cost.flops_per_example` does, which gives the same number, and averaged
    over the examples of all batches.

    Args:
        model: on torch's meta device or on the CPU; it is not to be used afterwards.
        batches: on the CPU; integers are used, of other tensors only their shape.
        loss: (model, batch) -> mean loss.
    """
    examples, gradients, forwards = 0, 0.0, 0.0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        shaped = model.to_empty(device="cpu")
        for batch in batches:
            given = {k: mode.from_tensor(v) if v.is_floating_point() else v for k, v in batch.items()}
            subject = Subject(shaped, [given], lambda model, batch: (loss(model, batch), 1), (), 0)
            with RealIntegers():
                gradients += flops_per_example(subject, examples=None) * rows(batch)
                counter = FlopCounterMode(display=False)
                with as_found(shaped), plain_attention(shaped), torch.no_grad(), counter:
                    loss(shaped, given)
            forwards += counter.get_total_flops()
            examples += rows(batch)
    return gradients / examples, forwards / examples
