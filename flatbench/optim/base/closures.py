"""Whose gradients a step is made with: those that its closure takes, and no others.

A closure may clear the gradients or leave that to the step. What is left over from an earlier step is cleared
right before the closure's first gradient would be added to it. What somebody put there since is not: the step
is refused, because it would not be the method's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from flatbench.errors import InputError

#: attributes of a gradient: its version when a step had used it, and when it had been filled with zeros; and
#: whether any of it was taken at another point than the method's
_SPENT, _ZERO, _ELSEWHERE = "_flatbench_spent", "_flatbench_zero", "_flatbench_elsewhere"
#: and the watch that has seen it
_SEEN = "_flatbench_seen"

#: the modules of others from which a step is called
_ACCELERATE = ("accelerate.optimizer",)
_LIGHTNING = tuple(
    f"{name}.loops.optimization.automatic" for name in ("lightning.pytorch", "pytorch_lightning")
)


def mark_spent(parameters: Iterable[Tensor]) -> None:
    """The gradients have made their step: whoever adds to them from here on means new ones."""
    for p in parameters:
        if p.grad is not None:
            setattr(p.grad, _SPENT, p.grad._version)
            setattr(p.grad, _ELSEWHERE, False)


def mark_zero(parameters: Iterable[Tensor]) -> None:
    """The gradients that are there have just been filled with zeros."""
    for p in parameters:
        if p.grad is not None:
            setattr(p.grad, _ZERO, p.grad._version)
            setattr(p.grad, _ELSEWHERE, False)


def mark_elsewhere(gradient: Tensor) -> None:
    """A part of the gradient was taken at the point at which a model is evaluated."""
    setattr(gradient, _ELSEWHERE, True)


def taken_elsewhere(p: Tensor) -> bool:
    """Whether a part of its gradient was."""
    return getattr(p.grad, _ELSEWHERE, False)


class ClosureWatch:
    """What a closure does with the gradients that are there when it is called; nothing is read from a device.

    Args:
        parameters: those whose gradients it takes.
        spent: whether all that is there has been used, as the first of two gradients has been.
    """

    def __init__(self, parameters: Iterable[Tensor], spent: bool = False) -> None:
        self._spent, self._mark = spent, object()
        #: each parameter and its gradient's version when the closure is called; the gradients are marked and
        #: not held, so that whoever clears them frees their memory
        self._before = [(p, -1 if p.grad is None else p.grad._version) for p in parameters]
        for p, _ in self._before:
            if p.grad is not None:
                setattr(p.grad, _SEEN, self._mark)
        #: norms of gradients that were neither cleared nor spent
        self._added_to: list[Tensor] = []
        self._handles: list[Any] = []
        self._passes: dict[int, int] = {}

    def __enter__(self) -> ClosureWatch:
        expected = _micro_batches_of_accelerate()
        for p, version in self._before:
            if not p.requires_grad:
                continue
            if expected > 1:
                self._handles.append(p.register_hook(self._counter(id(p))))
            if p.grad is not None and getattr(p.grad, _ZERO, None) != version:
                self._handles.append(p.register_hook(self._before_adding(p, version)))
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if failed is None and self.took_gradients:
            for p, version in self._before:  # what the closure took no gradient of
                self._drop(p, version)

    def _counter(self, key: int) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            self._passes[key] = self._passes.get(key, 0) + 1

        return count

    def _before_adding(self, p: Tensor, version: int) -> Callable[[Tensor], None]:
        def look(_: Tensor) -> None:
            self._drop(p, version)

        return look

    def _is_untouched(self, p: Tensor, version: int) -> bool:
        """Whether its gradient is the one that was there, with the same values."""
        return p.grad is None or (getattr(p.grad, _SEEN, None) is self._mark and p.grad._version == version)

    def _drop(self, p: Tensor, version: int) -> None:
        """Clear a gradient that the closure should have cleared, if it is not to be added to."""
        if p.grad is None or not self._is_untouched(p, version) or getattr(p.grad, _ZERO, None) == version:
            return
        if self._spent or getattr(p.grad, _SPENT, None) == version:
            p.grad = None
        else:
            self._added_to.append((p.grad.coalesce().values() if p.grad.is_sparse else p.grad).norm())

    @property
    def took_gradients(self) -> bool:
        """Whether any gradient is there that was not there before, or not with these values."""
        return any(not self._is_untouched(p, version) for p, version in self._before)

    @property
    def added(self) -> bool:
        """Whether gradients were there to which the closure added its own."""
        return bool(self._added_to)

    def check(self, method: str, allow_accumulation: bool) -> None:
        """Raise InputError if the step would be made with other gradients than the closure's.

        Args:
            method: what steps, for the message.
            allow_accumulation: whether gradients of earlier micro-batches may have been added to.
        """
        expected, found = _micro_batches_of_accelerate(), max(self._passes.values(), default=0)
        if self.took_gradients and found < expected:
            raise InputError(
                f"{method}: accelerate accumulates {expected} micro-batches a step and has not called the "
                "closure for the first ones, so that this one would be all of the step; call step(closure) "
                "outside of accelerator.accumulate(), with a closure over all micro-batches of the step"
            )
        if not self._added_to or (allow_accumulation and _lightning_calls()):
            return
        if any(bool(length != 0) for length in self._added_to):  # read only here, where it decides
            raise InputError(
                f"{method}: gradients were there before step(closure), and the closure adds its own to them, "
                "so that the step would be too long; call no backward() before step(closure), clear the "
                "gradients at the start of the closure (optimizer.zero_grad()), and let it run all "
                "micro-batches of the step"
            )


def _micro_batches_of_accelerate() -> int:
    """How many micro-batches accelerate's wrapper, if it is what calls the step, makes a step of."""
    state = sys.modules.get("accelerate.state")
    shared = {} if state is None else state.GradientState._shared_state
    if not shared:
        return 0
    accumulation: Any = state.GradientState()  # type: ignore[union-attr]
    steps = int(accumulation.num_steps)
    # the last step of an epoch may have fewer
    return steps if steps > 1 and not accumulation.end_of_dataloader and _is_caller(_ACCELERATE) else 0


def _lightning_calls() -> bool:
    """Whether Lightning's loop calls: it takes gradients of earlier micro-batches outside of a step."""
    return _is_caller(_LIGHTNING)


def _is_caller(modules: tuple[str, ...]) -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in modules:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
