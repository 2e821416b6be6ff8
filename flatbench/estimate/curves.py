"""Cost of a batch as a function of its size and length, counted on a few shapes, of a few layers.

The layers of a transformer are alike, so that one and two of each stack tell what any number costs; and a
batch costs in proportion to its examples, apart from what does not depend on them (the prompts of CLIP's
classes).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from flatbench.errors import InputError
from flatbench.estimate.operations import RealIntegers

Batch = Mapping[str, Tensor]

#: what configurations call the number of layers of a stack
_DEPTHS = ("num_hidden_layers", "num_layers", "depth")
#: and of a decoder's, where it has layers of its own
_DECODERS = ("num_decoder_layers", "decoder_layers")
#: examples and tokens of the batches that are counted
_EXAMPLES, _TOKENS = (1, 2), (32, 128)


@dataclass(frozen=True)
class Cost:
    """Of one gradient on a batch.

    Attributes:
        gradient: operations, those of the pass forward included; forward: of that pass.
        saved: bytes kept for the pass backward.
    """

    gradient: float = 0.0
    forward: float = 0.0
    saved: float = 0.0

    def plus(self, other: Cost, factor: float = 1.0) -> Cost:
        """This and a multiple of another."""
        return Cost(*(a + factor * b for a, b in zip(self.parts, other.parts, strict=True)))

    def times(self, factor: float) -> Cost:
        """A multiple of this."""
        return Cost().plus(self, factor)

    @property
    def parts(self) -> tuple[float, float, float]:
        """The three numbers."""
        return self.gradient, self.forward, self.saved


@dataclass(frozen=True)
class Curve:
    """The cost of batches of any size.

    Attributes:
        fixed: what does not depend on the examples; example: of each one;
        token, square: of each token of an example, and of its square.
    """

    fixed: Cost
    example: Cost
    token: Cost
    square: Cost

    def at(self, examples: int, tokens: float) -> Cost:
        """The cost of a batch of so many examples, padded to so many tokens."""
        one = self.example.plus(self.token, tokens).plus(self.square, tokens**2)
        return self.fixed.plus(one, examples)


def curve(
    config: Any,
    build: Callable[[Any], nn.Module],
    batch: Callable[[int, int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    texts: bool,
    pictures: bool,
    bf16: bool,
) -> Curve:
    """Count a model's costs.

    Args:
        build: configuration -> the adapted model on the meta device.
        batch: (examples, tokens) -> a batch.
        texts: whether a batch's length varies; pictures: whether an example has one.
        bf16: whether it trains under autocast.

    Raises InputError where a model needs more than shapes.
    """

    def counted(examples: int, tokens: int) -> Cost:
        return _of_all_layers(config, lambda made: count(build(made), batch(examples, tokens), loss, bf16))

    few, more = _EXAMPLES
    short, long = _TOKENS
    zero = Cost()
    first = counted(few, short)
    if not texts:
        example = counted(more, short).plus(first, -1.0)
        return Curve(first.plus(example, -1.0), example, zero, zero)
    last = counted(few, long)
    # autocast keeps a copy of the weights, whatever the number of examples
    copied = 2.0 * sum(p.numel() for p in build(config).parameters()) if bf16 else 0.0
    fixed = Cost(saved=min(copied, first.saved))
    if pictures:  # and few tokens beside them: in proportion to these
        slope = last.plus(first, -1.0).times(1 / (long - short))
        return Curve(fixed, first.plus(slope, -short).plus(fixed, -1.0), slope, zero)
    # a·T + b·T², from two lengths
    a, b = (one.plus(fixed, -1.0).times(1 / tokens) for one, tokens in ((first, short), (last, long)))
    square = b.plus(a, -1.0).times(1 / (long - short))
    return Curve(fixed, zero, a.plus(square, -short), square)


def _stacks(config: Any) -> Iterator[tuple[Any, str, int]]:
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    for part in [part for part in parts if part is not None] or [config]:
        for names in (_DEPTHS, _DECODERS):
            depths = [(name, getattr(part, name, None)) for name in names]
            yield from [(part, name, depth) for name, depth in depths if isinstance(depth, int)][:1]


def _shallow(config: Any, deeper: int | None = None) -> Any:
    """The configuration with one layer in each stack of layers, and two in one of them.

    Args:
        deeper: the stack's place among `_stacks`.
    """
    made = copy.deepcopy(config)
    for i, (part, name, _) in enumerate(_stacks(made)):
        layers = 2 if i == deeper else 1
        setattr(part, name, layers)
        if name not in _DECODERS and getattr(part, "layer_types", None):  # one entry a layer
            part.layer_types = part.layer_types[:layers]
    return made


def _of_all_layers(config: Any, count: Callable[[Any], Cost]) -> Cost:
    base = count(_shallow(config))
    found = base
    for i, (_, _, depth) in enumerate(_stacks(config)):
        found = found.plus(count(_shallow(config, i)).plus(base, -1.0), depth - 1)
    return found


@contextmanager
def _note_saved_bytes(sizes: dict[int, int], own: set[int]) -> Iterator[None]:
    """Sizes in bytes of the memory that is kept for the pass backward, the model's own left out."""

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor.detach()  # else a saved output would keep its node, which keeps it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def count(model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor], bf16: bool) -> Cost:
    """Count one gradient on a batch. Raises InputError where the model needs more than shapes."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            shaped = model.to_empty(device="cpu").train()
            given = {k: mode.from_tensor(v) if v.is_floating_point() else v for k, v in batch.items()}
            own = {p.untyped_storage()._cdata for p in (*shaped.parameters(), *shaped.buffers())}
            sizes: dict[int, int] = {}
            counter = FlopCounterMode(display=False)
            half = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
            with RealIntegers(), counter, _note_saved_bytes(sizes, own), half:
                value = loss(shaped, given)
                forward = counter.get_total_flops()
                trained = [p for p in shaped.parameters() if p.requires_grad]
                torch.autograd.grad(value, trained, allow_unused=True)
                total = counter.get_total_flops()
    except Exception as error:  # whatever a model says that needs more than shapes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"not to be counted from shapes: {type(error).__name__}: {reason}") from error
    return Cost(float(total), float(forward), float(sum(sizes.values())))
