"""The two points that a base optimizer may have of its own, and what can be a base of what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatbench.errors import InputError

#: optimizers of others that ask for a closure, or cannot do without one
_ASK_CLOSURE = ("LBFGS", "BSAM", "AliG", "LookSAM")


class BaseModes:
    """`train` and `eval` of a base optimizer, where it has them, with an exact way back.

    Optimizers such as schedule-free AdamW compute one point from the other, which rounds; the weights of
    training are therefore kept while the base is at its point of evaluation, and put back where nobody has
    changed the weights since.

    Attributes:
        exist: whether the base has two points.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        #: one of ours, which returns exactly by itself
        self._is_method = is_method(base)
        own = callable(getattr(base, "train", None)) and callable(getattr(base, "eval", None))
        self.exist = own and (base.has_two_points if self._is_method else True)
        #: whether its two points are its own, not one of our methods
        self.foreign = self.exist and not self._is_method
        self._snapshot: tuple[list[Tensor], list[Tensor], list[int]] | None = None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def train(self) -> None:
        """The base to the point at which it takes gradients."""
        if not self.exist:
            return
        kept, self._snapshot = self._snapshot, None
        parameters = self._parameters()
        unchanged = (
            kept is not None and len(kept[0]) == len(parameters) and self._is_as_left(kept, parameters)
        )
        self.base.train()
        if kept is not None and unchanged:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept[0])

    def eval(self) -> None:
        """The base to the point at which its model is evaluated."""
        if not self.exist or self._snapshot is not None:
            return
        if self._is_method:
            self.base.eval()
            return
        parameters = self._parameters()
        before = [p.detach().clone() for p in parameters]
        self.base.eval()
        after = [p.detach().clone() for p in parameters]
        self._snapshot = before, after, [p._version for p in parameters]

    @staticmethod
    def _is_as_left(kept: tuple[list[Tensor], list[Tensor], list[int]], parameters: list[Tensor]) -> bool:
        pairs = zip(parameters, kept[1], kept[2], strict=True)
        return all(p._version == version or torch.equal(p, after) for p, after, version in pairs)

    def weights_of_training(self) -> list[Tensor] | None:
        """Copies of all its weights at its point of training, if it is a foreign one at the other."""
        return None if self._snapshot is None else [w.clone() for w in self._snapshot[0]]

    @torch.no_grad()
    def put_weights_of_training(self, weights: list[Tensor]) -> None:
        """Go to its point of training, which is there."""
        self._snapshot = None
        self.base.train()
        for p, stored in zip(self._parameters(), weights, strict=True):
            p.copy_(stored)


def is_method(base: Any) -> bool:
    """Whether an optimizer is one of flatbench."""
    return isinstance(getattr(base, "modes", None), BaseModes)


def asks_closure(base: Any) -> bool:
    """Whether an optimizer takes several gradients a step, which it asks a closure for."""
    if is_method(base):
        return bool(base.asks_closure)
    name = type(base).__name__
    return name in _ASK_CLOSURE or name.endswith("Closure") or callable(getattr(base, "first_step", None))


def check_base(method: Any, base: Any) -> None:
    """Raise InputError, by name, where ``method`` cannot be put around ``base``."""
    name, inner = type(method).__name__, type(base).__name__
    if not hasattr(base, "param_groups") or not callable(getattr(base, "step", None)):
        raise InputError(f"{name}: its base must be an optimizer, and a {inner} has no param_groups and step")
    if asks_closure(base) and not method.hands_closure_on:
        turned = f"; {inner} around {name} may be what you mean" if is_method(base) else ""
        raise InputError(
            f"{name} takes gradients itself and cannot be put around {inner}, which asks a closure for its "
            f"own{turned}"
        )
    innermost = [base, *(other.base for other in chain(base))][-1]
    if method.writes_weights and BaseModes(innermost).foreign:
        raise InputError(
            f"{name} scales weights and cannot be put around {type(innermost).__name__}, which computes "
            "them from two others of its own; choose another base optimizer"
        )
    for other in chain(base):
        if method.moves_training_point and other.moves_training_point:
            raise InputError(
                f"{name} cannot be put around {type(other).__name__}: both say at which point the gradient "
                "is taken; choose one of them"
            )
        if method.averages and other.averages:
            raise InputError(
                f"{name} cannot be put around {type(other).__name__}: both say which average is evaluated; "
                "choose one of them"
            )


def chain(base: Any) -> list[Any]:
    """The methods of flatbench among an optimizer and its bases, the outermost first."""
    found = []
    while is_method(base):
        found.append(base)
        base = base.base
    return found
