"""Two-gradient methods in transformers' Trainer, and in the trainers that derive from it."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

from torch import Tensor, nn

from flatbench.optim.base import TwoGradients
from flatbench.optim.base.two_gradients import RandomState, batch_norm_statistics_fixed


class SharpnessAwareTrainer:
    """A mixin that takes the second gradient before the Trainer clips and steps.

    Put it before the Trainer, and give that an optimizer of `flatbench.optim`::

        class Trainer(SharpnessAwareTrainer, transformers.Trainer):
            pass

        trainer = Trainer(model, arguments, optimizers=(SAM(base, model), scheduler), ...)

    One-gradient methods do not need it, and are left alone by it. With accumulation the micro-batches of a
    step are kept and run a second time at the perturbed weights, each with the random numbers of its first
    time, and batch normalisation moves its statistics in the first pass only. What the Trainer sees as the
    gradient is the second one: that is what it clips, unscales and steps with. The losses that it logs are
    those at the unperturbed weights.

    Attributes:
        perturbation: with several processes, ``global`` averages the first gradient over them, so that all
            move to the same point; ``process`` lets each move by the gradient of its own part of the batch,
            which is m-sharpness with m the examples of a process, and saves one exchange of gradients.
    """

    perturbation: Literal["global", "process"] = "global"

    # what the class that this is mixed into has
    accelerator: Any
    optimizer: Any
    _passes: list[tuple[dict[str, Any], RandomState]] | None = None

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_step()  # of a training that failed: of an earlier call, or with a larger batch
        parent: Any = super()
        return parent._inner_training_loop(*args, **kwargs)

    def _forget_step(self) -> None:
        self._passes = None
        method = self._method()
        if method is not None:
            method.abandon()
            method.zero_grad()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        """Forward and backward pass of a micro-batch; with the step's last one, of all once more."""
        method = self._method()
        if method is None:
            return self._one_pass(model, inputs, num_items_in_batch, **kwargs)
        if self._passes is None:
            self._passes = []
        self._passes.append((inputs, RandomState(method.param_groups)))
        last = bool(self.accelerator.sync_gradients)
        alone = last and self.perturbation == "process" and method.gradients_of_next_step == 2
        try:
            with self.accelerator.no_sync(model) if alone else contextlib.nullcontext():
                loss = self._one_pass(model, inputs, num_items_in_batch, **kwargs)
            if last:
                passes, self._passes = self._passes, None
                self._second_gradient(method, model, passes, num_items_in_batch, kwargs)
        except BaseException:
            self._forget_step()
            raise
        return loss

    def _one_pass(self, model: nn.Module, inputs: Any, items: Any, **kwargs: Any) -> Tensor:
        parent: Any = super()
        # the Trainer may empty the mapping that it is given, and it is needed twice
        inputs = dict(inputs) if isinstance(inputs, dict) else inputs
        loss: Tensor = parent.training_step(model, inputs, items, **kwargs)
        return loss

    def _method(self) -> TwoGradients | None:
        found = self.optimizer
        while found is not None and not isinstance(found, TwoGradients):
            # accelerate wraps it, and so does a method that averages
            found = getattr(found, "optimizer", None) or getattr(found, "base", None)
        return found

    def _second_gradient(
        self,
        method: TwoGradients,
        model: nn.Module,
        passes: list[tuple[dict[str, Any], RandomState]],
        items: Any,
        kwargs: dict[str, Any],
    ) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        scale = scaler._get_scale_async() if scaler is not None and scaler.is_enabled() else None
        if not method.perturb(gradient_scale=scale):
            return
        try:
            method.zero_grad()
            with batch_norm_statistics_fixed(method.model):
                for i, (inputs, random) in enumerate(passes):
                    random.restore()
                    more = i < len(passes) - 1
                    with self.accelerator.no_sync(model) if more else contextlib.nullcontext():
                        self._one_pass(model, inputs, items, **kwargs)
        except BaseException:
            method.abandon()
            raise
        method.restore()
