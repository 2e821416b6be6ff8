"""Methods that take a second gradient at perturbed weights."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatbench.errors import InputError
from flatbench.optim.base.buffers import Buffers, Move, average_over_processes
from flatbench.optim.base.closures import ClosureWatch, mark_spent
from flatbench.optim.base.wrapped import Closure, WrappedOptimizer


class TwoGradients(WrappedOptimizer):
    """A method that perturbs the weights by a first gradient and steps with a second one taken there.

    Either ``step(closure)`` does all of it, or a training script calls its parts::

        loss.backward()          # at the weights; all micro-batches
        if optimizer.perturb():
            optimizer.zero_grad()
            loss_there.backward()  # the same micro-batches again
            optimizer.restore()
        optimizer.step()

    `flatbench.optim.trainer.SharpnessAwareTrainer` does so in transformers' Trainer.

    Attributes:
        every: perturb every k-th step only; the steps between take one gradient.
        m_sharpness: with several processes, each is perturbed by the gradient of its own part of the batch,
            whose m examples the sharpness is then of (arXiv 2010.01412, section 4.1). The closure has to
            leave the process's own gradient, with no exchange in either pass; the update's is averaged here.
    """

    every: int = 1
    m_sharpness: bool = False
    moves_training_point: ClassVar[bool] = True

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._gradient_scale: Tensor | float | None = None
        self._displacement: tuple[Buffers, list[Tensor]] | None = None
        self._ready = False
        #: watches, from `perturb` to `restore`, that the second gradient is taken by itself
        self._watch: ClosureWatch | None = None
        #: norm and count of skipped steps before `perturb`, to which a step that fails goes back
        self._before: tuple[Tensor, Tensor | int] = torch.tensor(float("nan")), 0
        super().__init__(base_optimizer, model)
        self.asks_closure = True
        self.gradients_per_step = 1 + 1 / self.every

    @property
    def gradients_of_next_step(self) -> int:
        """How many gradients the next step takes."""
        return 2 if self.steps % self.every == 0 else 1

    @abstractmethod
    def _move(self) -> Move:
        """What to add to which weights, from the gradients that are there."""

    def _combine(self) -> None:
        """Make the update's gradient of both; the weights are where they were."""

    def _observe_alone(self) -> None:
        """Make the update's gradient in a step that takes no second one."""

    @torch.no_grad()
    def perturb(self, gradient_scale: Tensor | float | None = None) -> bool:
        """Move the weights by the gradients that are there.

        Args:
            gradient_scale: what a GradScaler multiplied the loss by; the gradients are divided by it first.

        Whoever does not clear the gradients before the second ones are taken has them cleared.

        Returns:
            Whether a second gradient is to be taken there; then clear the gradients, take it with the same
            scale, and call `restore`. Otherwise the gradient is ready for `step`. Either way the update's
            gradient has its scale, and ``scaler.step(optimizer)`` takes it off.
        """
        if self._inner_optimizer is not None:
            return bool(self._inner_optimizer.perturb(gradient_scale))
        if self._displacement is not None:
            raise ValueError(
                f"{type(self).__name__}.perturb() was called twice; call restore() between, or abandon() "
                "after a second pass that failed"
            )
        self._check_place()
        self._gradient_scale, self._ready = gradient_scale, False
        if self.gradients_of_next_step == 1:
            with self._unscale():
                self._observe_alone()
            self._exchange()
            self._ready = True
            return False
        with self._unscale():
            move = self._move()
        self._displacement = (move.layout, move.layout.weights())
        if move.values:
            torch._foreach_add_(move.layout.parameters, move.values)
        self._before = self._norm, self.skipped_perturbations
        self._norm = move.norm
        self.skipped_perturbations = self.skipped_perturbations + move.skipped
        self._watch = ClosureWatch(self._parameters_of_groups, spent=True)
        self._watch.__enter__()
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back, bit by bit, and make the update's gradient of the two."""
        if self._inner_optimizer is not None:
            self._inner_optimizer.restore()
            return
        if self._displacement is None or self._watch is None:
            raise ValueError(f"{type(self).__name__}.restore() without perturb()")
        watch = self._watch
        watch.__exit__(None)  # whatever the second pass left of the first gradient is cleared
        self._put_back()
        # read from the device only where no second pass was made
        if not watch.took_gradients and bool(self.skipped_perturbations == self._before[1]):
            raise InputError(
                f"{type(self).__name__}: no gradient was taken between perturb() and restore(); run forward "
                "and backward pass of the same micro-batches again"
            )
        with self._unscale():
            self._combine()
        self._exchange()
        self._ready = True

    @torch.no_grad()
    def abandon(self) -> None:
        """Put the weights back after a second pass that failed, and forget the step that it was of."""
        if self._inner_optimizer is not None:
            self._inner_optimizer.abandon()
            return
        if self._displacement is not None:
            self._put_back()
            self._norm, self.skipped_perturbations = self._before
            self._forget_step()

    def _put_back(self) -> None:
        if self._watch is not None:
            self._watch.__exit__(InputError)
            self._watch = None
        if self._displacement is not None:
            layout, copies = self._displacement
            layout.copy_(copies)  # not subtracted: subtraction would drift
            self._displacement = None

    def _exchange(self) -> None:
        """Average the update's gradient over the processes where each had its own perturbation."""
        if self.m_sharpness:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            average_over_processes(gradients)

    @contextlib.contextmanager
    def _unscale(self) -> Iterator[None]:
        """The gradients without a GradScaler's factor, which is a power of two and leaves every bit."""
        factor = self._gradient_scale
        if factor is None:
            yield
            return
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / factor)
        yield
        torch._foreach_mul_(gradients, factor)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update.

        Args:
            closure: clears the gradients, runs forward and backward (all micro-batches of the step) and
                returns the loss. It is called twice, with the same random numbers both times; once in a
                step that is not perturbed. It may be left out after `perturb` and `restore`.

        Returns:
            The loss at the unperturbed weights.

        Raises:
            ValueError: no closure was given.
            InputError: the closure takes no gradient, or adds its own to gradients that somebody else took.
        """
        loss = None
        if closure is not None:
            self.abandon()
            loss = self._gradients_of(closure)
        elif not self._ready:
            raise ValueError(
                f"{type(self).__name__} takes two gradients a step: call step(closure) with a closure that "
                "clears the gradients, runs forward and backward, and returns the loss; in transformers' "
                "Trainer, use flatbench.optim.trainer.SharpnessAwareTrainer"
            )
        self._ready, self.stepping = False, True
        try:
            self.base.step()
        except BaseException:
            self._forget_step()
            raise
        finally:
            self.stepping = False
        self.steps += 1
        self._after_update()
        mark_spent(self._parameters_of_groups)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients; a step that was ready is forgotten."""
        if self._inner_optimizer is not None:
            self._inner_optimizer.zero_grad(set_to_none)
            return
        self._ready = False
        super().zero_grad(set_to_none)

    def eval(self) -> None:
        """Move the weights to the unperturbed point; a second pass that was under way is given up."""
        self.abandon()
        super().eval()

    def _gradients_of(self, closure: Closure) -> Any:
        self.train()
        random = RandomState(self.param_groups)
        watch = ClosureWatch(self._parameters_of_groups)
        with self.point.hold():
            with watch, torch.enable_grad():
                loss = closure()
            watch.check(type(self).__name__, allow_accumulation=False)
            if not watch.took_gradients:
                if self._ready:  # the parts were called, and whoever steps has a closure of its own
                    return loss
                raise InputError(
                    f"{type(self).__name__}: the closure took no gradient; it runs forward and backward "
                    "pass, and is called twice"
                )
            if self.perturb():
                try:
                    random.restore()  # the same dropout masks, or the perturbation would fit their noise
                    with torch.enable_grad(), batch_norm_statistics_fixed(self.model):
                        closure()
                except BaseException:
                    self.abandon()
                    raise
                self.restore()
        return loss


class RandomState:
    """Random state of the CPU and of the CUDA devices on which parameters lie."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        devices = {p.device for group in groups for p in group["params"] if p.device.type == "cuda"}
        self._cpu = torch.get_rng_state()
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Go back to that state."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


@contextlib.contextmanager
def batch_norm_statistics_fixed(model: nn.Module) -> Iterator[None]:
    """Batch normalisation uses the batch's statistics and does not move the running ones."""
    layers = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training
    ]
    momenta = [layer.momentum for layer in layers]
    counts = [None if m.num_batches_tracked is None else m.num_batches_tracked.clone() for m in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum, count in zip(layers, momenta, counts, strict=True):
            layer.momentum = momentum
            if count is not None and layer.num_batches_tracked is not None:
                layer.num_batches_tracked.copy_(count)
