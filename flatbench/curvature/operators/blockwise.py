"""Products with the curvature of a chain of blocks: exact, with one block's graph at a time.

A model is a chain ``x_{l+1} = f_l(x_l, θ_l)`` with the loss ``L = h(x_n, θ_h)``; what is before the first
block (the stem) makes ``x_0``, and what is behind the last one (the tail) is h. Once: the hidden states x_l
and their gradients ``g_l = ∂L/∂x_l``, without graphs. Then for each vector v:

1. Up: ``ẋ_{l+1} = J_l (ẋ_l, v_l)``, by forward mode.
2. The tail's own product: ``(ġ_n, (Hv)_h) = ∇²h (ẋ_n, v_h)``.
3. Down: with ``s_l(x, θ) = J_lᵀ g_{l+1}``, whose Jacobian is symmetric for it is a gradient,
   ``(ġ_l, (Hv)_l) = ∇_{(x,θ)} [⟨s_l, (ẋ_l, v_l)⟩ + ⟨f_l, ġ_{l+1}⟩]``.

Where a block's graph is kept, step 1 is ``∇_u ⟨J_lᵀu, (ẋ_l, v_l)⟩`` in it. For Gauss-Newton products, step 2
is with ``Jᵀ∇²c J``, and step 3 with ``J_lᵀ ġ_{l+1}`` alone. Contributions of a weight that is used in
several parts are summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from flatbench.curvature.operators.chain import Call, NoChain, Walk
from flatbench.curvature.operators.graphs import Before, Graph, depends_on, require_second_derivatives

#: vectors from which on tangents go up by a block's graph that all share, in place of forward mode
_SHARED = 3

#: computes the loss, and gives its graph in what the function says and in the parameters
Build = Callable[[Before], "Graph | None"]


@dataclass
class _Link:
    """A block's graph: its output y, and ``s = Jᵀu`` with the graph of that."""

    variables: list[Tensor]
    y: Tensor
    u: Tensor
    slopes: Sequence[Tensor | None]

    def push(self, along: Sequence[Tensor | None], keep: bool) -> Tensor | None:
        """``J·along`` as ``∇_u ⟨s, along⟩``."""
        outputs, weights = self._pair(along)
        if not outputs:
            return None
        found: Tensor | None = torch.autograd.grad(
            outputs, [self.u], weights, retain_graph=keep, allow_unused=True
        )[0]
        return found

    def pull(self, along: Sequence[Tensor | None], bent: Tensor, keep: bool) -> Sequence[Tensor | None]:
        """``∇ [⟨s, along⟩ + ⟨y, bent⟩]`` in the variables."""
        if not self.y.requires_grad:
            return [None] * len(self.variables)
        outputs, weights = self._pair(along)
        return torch.autograd.grad(
            [*outputs, self.y], self.variables, [*weights, bent], retain_graph=keep, allow_unused=True
        )

    def _pair(self, along: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(s, a) for s, a in zip(self.slopes, along, strict=True) if s is not None and a is not None]
        pairs = [(s, a) for s, a in pairs if s.requires_grad]
        return [s for s, _ in pairs], [a for _, a in pairs]


class Blockwise:
    """A piece's loss as a chain, with what products need; see the module.

    Attributes:
        loss, terms: of the piece.
        gradients: by parameter.
    """

    loss: float
    terms: int
    gradients: Sequence[Tensor | None]

    def __init__(
        self, walk: Walk, tail: Graph, parameters: Sequence[nn.Parameter], gauss_newton: bool
    ) -> None:
        self._tail, self._gauss_newton, self._parameters = tail, gauss_newton, list(parameters)
        self.loss, self.terms = tail.loss, tail.terms
        self._stem = _Stem(walk.stem, parameters) if depends_on(walk.stem, parameters) else None
        own = [_places(call, parameters) for call in walk.calls]
        # what is before the first block that moves is a constant
        first = 0 if self._stem else next((i for i, each in enumerate(own) if each), len(own))
        self._calls, self._own = walk.calls[first:], own[first:]
        self._links: dict[int, _Link] = {}
        self._forward_mode = True
        if tail.gradients[0] is None:
            raise NoChain("the loss does not depend on the last block")
        self._slopes: list[Tensor] = [torch.empty(0)] * (len(self._calls) + 1)
        self._slopes[-1] = tail.gradients[0].detach()
        self.gradients = ()

    @classmethod
    def built(
        cls,
        build: Build,
        blocks: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        *,
        gauss_newton: bool = False,
        kept: int = 0,
    ) -> Blockwise | None:
        """From one pass of the loss; None where it has no terms.

        Args:
            kept: how many blocks keep their graphs for further products, the last ones.

        Raises NoChain where the blocks are none.
        """
        made = cls.without_gradients(build, blocks, parameters, gauss_newton)
        if made is not None:
            made.gradients = made._gradients(made._tail.gradients[1:], kept)
        return made

    @classmethod
    def without_gradients(
        cls, build: Build, blocks: Sequence[nn.Module], parameters: Sequence[nn.Parameter], gauss_newton: bool
    ) -> Blockwise | None:
        """The same before the gradients are made."""
        walk = Walk(blocks, parameters)
        with walk.intercepted():
            tail = build(lambda: [walk.last()])
        return None if tail is None else cls(walk, tail, parameters, gauss_newton)

    def state_bytes(self) -> int:
        """A hidden state."""
        return self._slopes[-1].numel() * self._slopes[-1].element_size()

    def __len__(self) -> int:
        """How many blocks there are to go through."""
        return len(self._calls)

    # -- in parts, to be measured before there are gradients ----------------------------------------------

    def start_stem(self) -> None:
        """Make what the stem holds between products."""
        if self._stem is not None:
            self._stem.start(torch.zeros_like(self._stem.output))

    def tail_product(self, vectors: Sequence[Tensor]) -> None:
        """The tail's and the stem's part of a product."""
        top = torch.zeros_like(self._slopes[-1])
        self._tail.product([top, *vectors], keep=True)
        if self._stem is not None:
            self._stem.push(vectors)
            self._stem.pull(vectors, torch.zeros_like(self._stem.output), self._gauss_newton)

    def kinds(self) -> list[list[int]]:
        """The blocks' places, by kinds that take the same."""
        found: dict[Any, list[int]] = {}
        for index, call in enumerate(self._calls):
            own = tuple(self._parameters[i].shape for i in self._own[index])
            kind = (type(call.module), call.x.shape, self._moves(index), own)
            found.setdefault(kind, []).append(index)
        return list(found.values())

    def rehearsal(self, index: int, vectors: Sequence[Tensor]) -> Callable[[], None]:
        """What goes through a block up and down, as a product does."""
        last = index + 1 == len(self._calls)
        after = self._slopes[-1] if last else self._calls[index + 1].x
        self._slopes[index + 1] = after.detach()
        tangent = torch.zeros_like(self._calls[index].x) if self._moves(index) else None
        bent = torch.zeros_like(after)

        def step() -> None:
            self._push(index, [vectors], [tangent])
            self._down(index, [vectors], [tangent], [bent], [[None] * len(vectors)])

        return step

    def keep(self, index: int) -> None:
        """Keep a block's graph."""
        self._links[index] = self._link(index, self._slopes[index + 1], moving=True)

    def forget(self, index: int) -> None:
        """Give a block's graph back."""
        del self._links[index]

    # -- gradients ----------------------------------------------------------------------------------------

    def forget_gradients(self) -> None:
        """Give the memory of `gradients` back."""
        self.gradients = ()

    def _gradients(self, of_tail: Sequence[Tensor | None], kept: int) -> list[Tensor | None]:
        found = [None if each is None else each.detach() for each in of_tail]
        for index in reversed(range(len(self._calls))):
            if index >= len(self._calls) - kept:
                self.keep(index)
                slopes = self._links[index].slopes
            else:
                variables, y = self._output(index)
                slopes = _pulled_back(y, variables, self._slopes[index + 1], create_graph=False)
            self._slopes[index] = self._input_part(index, slopes)
            self._add(found, index, slopes)
        if self._stem is not None:
            _add(found, range(len(found)), self._stem.start(self._slopes[0]))
        return found

    # -- one block ----------------------------------------------------------------------------------------

    def _moves(self, index: int) -> bool:
        """Whether a block's input depends on the space."""
        return index > 0 or self._stem is not None

    def _output(self, index: int) -> tuple[list[Tensor], Tensor]:
        """A block's variables (its input as a leaf, if that moves, and its parameters) and output."""
        x = self._calls[index].x.detach().requires_grad_(self._moves(index))
        own: list[Tensor] = [self._parameters[i] for i in self._own[index]]
        return [x, *own] if self._moves(index) else own, self._calls[index](x)

    def _link(self, index: int, u: Tensor, *, moving: bool = False) -> _Link:
        variables, y = self._output(index)
        u = u.detach().requires_grad_(moving)
        slopes = _pulled_back(y, variables, u, create_graph=True)
        require_second_derivatives(slopes)
        return _Link(variables, y, u, slopes)

    def _along(self, index: int, vectors: Sequence[Tensor], tangent: Tensor | None) -> list[Tensor | None]:
        own: list[Tensor | None] = [vectors[i] for i in self._own[index]]
        return [tangent, *own] if self._moves(index) else own

    def _input_part(self, index: int, found: Sequence[Tensor | None]) -> Tensor:
        """Of derivatives in a block's variables, that in its input."""
        if not self._moves(index):
            return torch.empty(0)
        return torch.zeros_like(self._calls[index].x) if found[0] is None else found[0].detach()

    def _add(self, into: list[Tensor | None], index: int, found: Sequence[Tensor | None]) -> None:
        """Add derivatives in a block's variables to those of the parameters."""
        _add(into, list(self._own[index]), found[1:] if self._moves(index) else found)

    # -- products -----------------------------------------------------------------------------------------

    def product(self, vectors: Sequence[Tensor], keep: bool) -> Sequence[Tensor | None]:
        """Product with the piece's matrix, a tensor per parameter; ``keep`` for further products."""
        return self.products([vectors], keep)[0]

    def products(self, several: Sequence[Sequence[Tensor]], keep: bool) -> list[list[Tensor | None]]:
        """The same for several vectors, which share the blocks' graphs."""
        ups = self._up(several)
        bends: list[Tensor] = []
        found: list[list[Tensor | None]] = []
        for number, (vectors, top) in enumerate(zip(several, ups.pop(), strict=True)):
            moved = torch.zeros_like(self._slopes[-1]) if top is None else top
            more = keep or number < len(several) - 1
            bent, *parts = self._tail.product([moved, *vectors], keep=more)
            bends.append(torch.zeros_like(moved) if bent is None else bent.detach())
            found.append([None if part is None else part.detach() for part in parts])
        for index in reversed(range(len(self._calls))):
            bends = self._down(index, several, ups.pop(), bends, found)
        if self._stem is not None:
            for vectors, bent, into in zip(several, bends, found, strict=True):
                _add(into, range(len(vectors)), self._stem.pull(vectors, bent, self._gauss_newton))
        return found

    def _up(self, several: Sequence[Sequence[Tensor]]) -> list[list[Tensor | None]]:
        """The tangents of each hidden state, vector by vector."""
        start: list[Tensor | None] = [None] * len(several)
        if self._stem is not None:
            start = [self._stem.push(vectors) for vectors in several]
        ups = [start]
        for index in range(len(self._calls)):
            ups.append(self._push(index, several, ups[-1]))
        return ups

    def _push(
        self, index: int, several: Sequence[Sequence[Tensor]], tangents: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        linked = self._links.get(index)
        if linked is None and self._forward_mode and len(several) < _SHARED:
            try:
                return [self._forward(index, v, t) for v, t in zip(several, tangents, strict=True)]
            except RuntimeError as error:
                if "forward AD" not in str(error) and "jvp" not in str(error):
                    raise
                self._forward_mode = False  # an operation without it
        if linked is None:
            linked = self._link(index, self._slopes[index + 1], moving=True)
        along = [self._along(index, v, t) for v, t in zip(several, tangents, strict=True)]
        return [linked.push(each, keep=True) for each in along]

    def _forward(self, index: int, vectors: Sequence[Tensor], tangent: Tensor | None) -> Tensor | None:
        """``J (ẋ, v)`` by forward mode."""
        call, own = self._calls[index], self._own[index]
        with forward_ad.dual_level(), torch.no_grad(), contextlib.ExitStack() as stack:
            for number, places in own.items():
                dual = forward_ad.make_dual(self._parameters[number].detach(), vectors[number])
                stack.enter_context(_replace(places, dual))
            x = call.x if tangent is None else forward_ad.make_dual(call.x, tangent)
            moved: Tensor | None = forward_ad.unpack_dual(call(x)).tangent
        return moved

    def _down(
        self,
        index: int,
        several: Sequence[Sequence[Tensor]],
        tangents: Sequence[Tensor | None],
        bends: Sequence[Tensor],
        into: Sequence[list[Tensor | None]],
    ) -> list[Tensor]:
        """``(ġ_l, (Hv)_l)`` of a block, vector by vector; the second is added."""
        linked, kept = self._links.get(index), index in self._links
        if linked is None and not self._gauss_newton:
            linked = self._link(index, self._slopes[index + 1])
        if linked is None or self._gauss_newton:
            variables, y = (linked.variables, linked.y) if linked is not None else self._output(index)
            linked = _Link(variables, y, y, [None] * len(variables))
        found = []
        for number, (vectors, tangent) in enumerate(zip(several, tangents, strict=True)):
            along = self._along(index, vectors, tangent)
            parts = linked.pull(along, bends[number], keep=kept or number < len(several) - 1)
            found.append(self._input_part(index, parts))
            self._add(into[number], index, parts)
        return found


class _Stem:
    """What makes the first hidden state, with its graph: embeddings, as far as they are in the space."""

    def __init__(self, output: Tensor, parameters: Sequence[nn.Parameter]) -> None:
        self.output, self._parameters = output, list(parameters)

    def start(self, slope: Tensor) -> Sequence[Tensor | None]:
        """Its gradient ``Jᵀg``, whose graph in g and in the parameters is kept."""
        self._slope = slope.detach().clone().requires_grad_()
        self._pullback = torch.autograd.grad(
            self.output, self._parameters, self._slope, create_graph=True, allow_unused=True
        )
        require_second_derivatives(self._pullback)
        return self._pullback

    def _pairs(self, vectors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = [(p, v) for p, v in zip(self._pullback, vectors, strict=True) if p is not None]
        return [p for p, _ in pairs], [v for _, v in pairs]

    def push(self, vectors: Sequence[Tensor]) -> Tensor | None:
        """``J v``."""
        outputs, weights = self._pairs(vectors)
        found: Tensor = torch.autograd.grad(outputs, [self._slope], weights, retain_graph=True)[0]
        return found

    def pull(self, vectors: Sequence[Tensor], bent: Tensor, gauss_newton: bool) -> Sequence[Tensor | None]:
        """``∇_θ [⟨Jᵀg, v⟩ + ⟨x_0, ġ⟩]``."""
        outputs, weights = ([], []) if gauss_newton else self._pairs(vectors)
        return torch.autograd.grad(
            [*outputs, self.output], self._parameters, [*weights, bent], retain_graph=True, allow_unused=True
        )


def _pulled_back(
    y: Tensor, variables: Sequence[Tensor], u: Tensor, create_graph: bool
) -> Sequence[Tensor | None]:
    """``Jᵀu``; nothing where a block does not use what it holds of the space (merged adapters)."""
    if not y.requires_grad:
        return [None] * len(variables)
    return torch.autograd.grad(y, variables, u, create_graph=create_graph, allow_unused=True)


def _places(call: Call, parameters: Sequence[nn.Parameter]) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """Where a block holds parameters of the space, by their number."""
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in call.module.modules():
        for key, held in module._parameters.items():
            if held is not None and id(held) in numbers:
                found.setdefault(numbers[id(held)], []).append((module._parameters, key))
    return found


@contextlib.contextmanager
def _replace(places: Sequence[tuple[dict[str, Any], str]], tensor: Tensor) -> Iterator[None]:
    before = [held[key] for held, key in places]
    try:
        for held, key in places:
            held[key] = tensor
        yield
    finally:
        for (held, key), old in zip(places, before, strict=True):
            held[key] = old


def _add(into: list[Tensor | None], numbers: Sequence[int], parts: Sequence[Tensor | None]) -> None:
    for number, part in zip(numbers, parts, strict=True):
        if part is not None:
            before = into[number]
            into[number] = part.detach() if before is None else before + part.detach()
