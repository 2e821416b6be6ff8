"""Cross entropy of logits that are made a few tokens at a time: its value, gradient and Hessian products.

With u = W·x + b, z = φ(u) elementwise, p = softmax(z) and a target q (one class, or smoothed), a token's
gradient in u is ``φ'(u)·(p − q)``, and along (ẋ, Ẇ, ḃ), with u̇ = W·ẋ + Ẇ·x + ḃ and ż = φ'(u)·u̇, its change is
``φ''(u)·u̇·(p − q) + φ'(u)·p·(ż − ⟨p, ż⟩)``; what it is in x, W and b follows from u being linear in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: bytes of a chunk's logits, and how many tensors of that size a product holds
CHUNK, TENSORS = 16_000_000, 5


@dataclass(frozen=True)
class Shape:
    """What is done to u = W·x + b: ``after · tanh(before · u)`` where capped, else ``before · u``."""

    kind: torch.dtype
    before: float = 1.0
    capped: bool = False
    after: float = 1.0

    def scaled(self, factor: float) -> Shape:
        """The same, then multiplied."""
        if self.capped:
            return replace(self, after=self.after * factor)
        return replace(self, before=self.before * factor)

    def apply(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits, and the hyperbolic tangent on the way where they are capped."""
        z = u.to(self.kind)
        z = z * self.before if self.before != 1 else z
        if not self.capped:
            return z, None
        t = z.tanh()
        return t * self.after, t

    def slope(self, t: Tensor | None) -> Tensor | float:
        """φ'."""
        return self.before if t is None else self.before * self.after * (1 - t.square())


@dataclass(frozen=True)
class Spec:
    """A cross entropy: targets ``(N,)``, what is done to the products, smoothing, and each token's weight."""

    target: Tensor
    form: Shape
    smoothing: float
    weight: float

    def chunks(self, classes: int) -> Iterator[slice]:
        """The tokens, a few at a time."""
        step = self.step(classes)
        for start in range(0, len(self.target), step):
            yield slice(start, start + step)

    def step(self, classes: int) -> int:
        """Tokens of a chunk."""
        return max(CHUNK // (classes * self.form.kind.itemsize), 1)

    def chunk_bytes(self, classes: int) -> int:
        """The largest chunk's logits."""
        return min(self.step(classes), len(self.target)) * classes * self.form.kind.itemsize

    def at(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, part: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of some tokens: the loss, p, p − q, and tanh where the logits are capped."""
        z, t = self.form.apply(functional.linear(x[part], weight, bias))
        target = self.target[part, None]
        total = z.logsumexp(dim=1, keepdim=True)
        own = z.gather(1, target)
        loss = (total - own).sum()
        if self.smoothing:
            spread = (total - z.mean(dim=1, keepdim=True)).sum()
            loss = (1 - self.smoothing) * loss + self.smoothing * spread
        p = z.sub_(total).exp_() if t is not None or self.form.before != 1 else (z - total).exp_()
        off = p - self.smoothing / p.shape[1] if self.smoothing else p.clone()
        off.scatter_add_(1, target, torch.full_like(own, self.smoothing - 1))
        return loss, p, off, t


class Entropy(torch.autograd.Function):
    """The loss of `Spec`; its gradient is taken on the way, while a chunk's logits are there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: Spec) -> Tensor:
        """``spec.weight · Σ`` over the tokens."""
        wanted = ctx.needs_input_grad
        total = torch.zeros((), dtype=spec.form.kind, device=x.device)
        gx = torch.empty_like(x) if wanted[0] else None
        gw = torch.zeros_like(weight) if wanted[1] else None
        gb = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        for part in spec.chunks(len(weight)):
            loss, p, off, t = spec.at(x, weight, bias, part)
            del p
            total += loss
            if any(wanted):
                _spread(off.mul_(spec.form.slope(t)).to(x.dtype), x[part], weight, part, (gx, gw, gb))
        made = [each.mul_(spec.weight) if each is not None else None for each in (gx, gw, gb)]
        ctx.spec = spec
        ctx.save_for_backward(x, weight, bias, *made)
        return total * spec.weight

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Differentiable once more."""
        apply: Any = _Slope.apply
        made = apply(slope, *ctx.saved_tensors[:3], ctx.spec, *ctx.saved_tensors[3:])
        return (*made, None)


def _spread(
    at_u: Tensor,
    x: Tensor,
    weight: Tensor,
    part: slice,
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Add what a gradient in u is in x, W and b."""
    gx, gw, gb = into
    if gx is not None:
        gx[part] = at_u @ weight
    if gw is not None:
        gw.addmm_(at_u.T, x)
    if gb is not None:
        gb += at_u.sum(dim=0)


class _Slope(torch.autograd.Function):
    """``slope`` times the gradients that `Entropy` took, as functions of x, W and b."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: Spec,
        *made: Tensor | None,
    ) -> Any:
        """The gradients; those that were not taken are None."""
        ctx.spec, ctx.has_bias = spec, bias is not None
        ctx.save_for_backward(slope, x, weight, bias, *made)
        ctx.set_materialize_grads(False)
        return tuple(None if each is None else each * slope.to(each.dtype) for each in made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *along: Tensor | None) -> Any:
        """The Hessian's product with the directions ``along`` x, W and b."""
        slope, x, weight, bias, *made = ctx.saved_tensors
        spec, wanted = ctx.spec, ctx.needs_input_grad
        pairs = [(a, m) for a, m in zip(along, made, strict=True) if a is not None and m is not None]
        of_slope = sum(((a * m).sum() for a, m in pairs), torch.zeros_like(slope)) if wanted[0] else None
        gx = torch.zeros_like(x) if wanted[1] else None
        gw = torch.zeros_like(weight) if wanted[2] else None
        gb = torch.zeros_like(bias) if bias is not None and wanted[3] else None
        if pairs:
            _bend(spec, (x, weight, bias), along, (gx, gw, gb), spec.weight * float(slope))
        return (of_slope, gx, gw, gb, None, None, None, None)


def _bend(
    spec: Spec,
    point: tuple[Tensor, Tensor, Tensor | None],
    along: tuple[Tensor | None, ...],
    into: tuple[Tensor | None, Tensor | None, Tensor | None],
    factor: float,
) -> None:
    """Write ``factor`` times the Hessian's product into zeros: of x, W and b along x, W and b."""
    x, weight, bias = point
    ax, aw, ab = along
    gx, gw, gb = into
    for part in spec.chunks(len(weight)):
        _, p, off, t = spec.at(x, weight, bias, part)
        slope = spec.form.slope(t)
        change = _along(x[part], weight, (None if ax is None else ax[part], aw, ab)).to(p.dtype)
        at_u = (change * slope).mul_(p)
        at_u.sub_(p.mul_(at_u.sum(dim=1, keepdim=True))).mul_(slope)
        # off·φ' is the gradient in u, which meets the direction again where W·x is bilinear
        plain = (off * slope).to(x.dtype)
        if t is not None:
            bent = t * (1 - t.square()) * (-2 * spec.form.after * spec.form.before**2)
            at_u.add_(bent.mul_(change).mul_(off))
        del p, off, change
        at_u, plain = at_u.mul_(factor).to(x.dtype), plain.mul_(factor)
        _spread(at_u, x[part], weight, part, (gx, gw, gb))
        if gx is not None and aw is not None:
            gx[part] += plain @ aw
        if gw is not None and ax is not None:
            gw.addmm_(plain.T, ax[part])


def _along(x: Tensor, weight: Tensor, along: tuple[Tensor | None, ...]) -> Tensor:
    """The change of u along x, W and b."""
    ax, aw, ab = along
    found = torch.zeros((), dtype=x.dtype, device=x.device).expand(len(x), len(weight))
    if ax is not None:
        found = ax @ weight.T
    if aw is not None:
        found = found + x @ aw.T
    return found if ab is None else found + ab
