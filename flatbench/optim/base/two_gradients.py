"""What every training method shares: a `torch.optim.Optimizer` around a base optimizer."""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatbench.optim.base.buffers import Buffers, Move, average_over_processes

Closure = Callable[[], Any]
RhoSchedule = Literal["constant", "linear", "cosine", "inv_sqrt", "growing_cosine", "lr"]
Norm = Literal["global", "layer"]

#: where a method keeps its own state in `state_dict`, beside the base optimizer's
EXTRA = "flatbench"


class WrappedOptimizer(torch.optim.Optimizer):
    """A training method around ``base_optimizer``, which makes the update.

    Parameter groups and state are the base optimizer's own, so schedulers work on either. Hooks of the base
    optimizer's ``step`` run right before and after the update: with two gradients a step, clipping in a
    step-pre-hook of the base clips the second one.

    Args:
        base_optimizer: any torch optimizer over the parameters to train.
        model: the model that holds them.

    Attributes:
        gradients_per_step: how often a step asks the closure, on average.
        needs_adapter: whether the method has no meaning without LoRA factors.
        skipped_perturbations: steps whose gradient was zero or not finite, so that nothing was perturbed.
    """

    gradients_per_step: float = 1
    needs_adapter: ClassVar[bool] = False

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.base = base_optimizer
        self.model = model
        self._norm = torch.tensor(float("nan"))
        self.skipped_perturbations: Tensor | int = 0
        self.steps = 0
        groups, state = base_optimizer.param_groups, base_optimizer.state
        super().__init__(groups, dict(base_optimizer.defaults))
        base_optimizer.param_groups, base_optimizer.state = groups, state

    @property
    def perturbation_norm(self) -> Tensor:
        """Norm of the last perturbation, 0-dimensional; NaN before the first."""
        return self._norm

    # The base optimizer owns groups and state: it replaces both when it loads a state.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    @property
    def gradients_of_next_step(self) -> int:
        """How often the next step asks the closure."""
        return 1

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update with the closure's gradients, or with those that are there."""
        loss = None
        if closure is not None:
            loss = self._gradients_of(closure)
        self._before_update()
        self.base.step()
        self.steps += 1
        self._after_update()
        return loss

    def _gradients_of(self, closure: Closure) -> Any:
        with torch.enable_grad():
            return closure()

    def _before_update(self) -> None:
        """What happens between the gradients and the base optimizer's step."""

    def _after_update(self) -> None:
        """What happens after the base optimizer's step, which is counted already."""

    def train(self) -> None:
        """Move the weights to the point at which gradients are taken."""

    def eval(self) -> None:
        """Move the weights to the unperturbed point, at which a model is evaluated and saved."""

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and, under ``"flatbench"``, the method's own; right in either mode."""
        own = {
            "method": type(self).__name__,
            "steps": self.steps,
            "skipped_perturbations": int(self.skipped_perturbations),
            "perturbation_norm": self.perturbation_norm.detach().clone(),
        }
        return {**self.base.state_dict(), EXTRA: own | self._own_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError if it is not a state of this method."""
        if EXTRA not in state_dict:
            raise ValueError(f"not a state of {type(self).__name__}: it has no part named '{EXTRA}'")
        own = state_dict[EXTRA]
        if own["method"] != type(self).__name__:
            raise ValueError(f"not a state of {type(self).__name__}: it is one of {own['method']}")
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != EXTRA})
        self.steps = own["steps"]
        self.skipped_perturbations = own["skipped_perturbations"]
        self._norm = own["perturbation_norm"]
        self._load_own_state(own)

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        pass

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


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

    Args:
        every: perturb every k-th step only; the steps between take one gradient.
        m_sharpness: see `m_sharpness`.

    Attributes:
        m_sharpness: with several processes, each is perturbed by the gradient of its own part of the batch,
            whose m examples the sharpness is then of (arXiv 2010.01412, section 4.1). The closure has to
            leave the process's own gradient, with no exchange in either pass; the update's is averaged here.
    """

    m_sharpness: bool = False

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        self.every = every
        self._gradient_scale: Tensor | float | None = None
        self._moved: tuple[Buffers, list[Tensor]] | None = None
        self._ready = False
        super().__init__(base_optimizer, model)
        self.gradients_per_step = 1 + 1 / every

    @property
    def gradients_of_next_step(self) -> int:
        """How many gradients the next step takes."""
        return 2 if self.steps % self.every == 0 else 1

    @abstractmethod
    def _move(self) -> Move:
        """What to add to which weights, from the gradients that are there."""

    def _combine(self) -> None:
        """Make the update's gradient of both; the weights are where they were."""

    def _alone(self) -> None:
        """Make the update's gradient in a step that takes no second one."""

    @torch.no_grad()
    def perturb(self, gradient_scale: Tensor | float | None = None) -> bool:
        """Move the weights by the gradients that are there.

        Args:
            gradient_scale: what a GradScaler multiplied the loss by; the gradients are divided by it first.

        Returns:
            Whether a second gradient is to be taken there; then clear the gradients, take it with the same
            scale, and call `restore`. Otherwise the gradient is ready for `step`. Either way the update's
            gradient has its scale, and ``scaler.step(optimizer)`` takes it off.
        """
        if self._moved is not None:
            raise ValueError(f"{type(self).__name__}.perturb() was called twice; call restore() between")
        self._gradient_scale, self._ready = gradient_scale, False
        if self.gradients_of_next_step == 1:
            with self._unscaled():
                self._alone()
            self._exchange()
            self._ready = True
            return False
        with self._unscaled():
            move = self._move()
        self._moved = (move.layout, move.layout.weights())
        if move.values:
            torch._foreach_add_(move.layout.parameters, move.values)
        self._norm = move.norm
        self.skipped_perturbations = self.skipped_perturbations + move.skipped
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back, bit by bit, and make the update's gradient of the two."""
        if self._moved is None:
            raise ValueError(f"{type(self).__name__}.restore() without perturb()")
        self.abandon()
        with self._unscaled():
            self._combine()
        self._exchange()
        self._ready = True

    @torch.no_grad()
    def abandon(self) -> None:
        """Put the weights back after a second pass that failed."""
        if self._moved is not None:
            layout, copies = self._moved
            layout.copy_(copies)  # not subtracted: subtraction would drift
            self._moved = None

    def _exchange(self) -> None:
        """Average the update's gradient over the processes where each had its own perturbation."""
        if self.m_sharpness:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            average_over_processes(gradients)

    @contextlib.contextmanager
    def _unscaled(self) -> Iterator[None]:
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
        """
        loss = None
        if closure is not None:
            loss = self._gradients_of(closure)
        elif not self._ready:
            raise ValueError(
                f"{type(self).__name__} takes two gradients a step: call step(closure) with a closure that "
                "clears the gradients, runs forward and backward, and returns the loss; in transformers' "
                "Trainer, use flatbench.optim.trainer.SharpnessAwareTrainer"
            )
        self._ready = False
        self.base.step()
        self.steps += 1
        return loss

    def _gradients_of(self, closure: Closure) -> Any:
        random = RandomState(self.param_groups)
        with torch.enable_grad():
            loss = closure()
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


class Radius:
    """The radius ``rho`` over training (arXiv 2508.00522 reduces it; its text does not say how).

    ``constant``: rho; ``linear``: rho·(1 - t/T); ``cosine``: rho·(1 + cos(π·t/T))/2; ``inv_sqrt``:
    rho/sqrt(t + 1); ``growing_cosine``: rho·(1 - cos(π·t/T))/2; ``lr``: rho times the learning rate's share
    of its largest value. t = 0 at the first step and T = ``total_steps``.

    Args:
        name: what the value is called, for messages.

    Raises:
        ValueError: rho is negative, or T is missing where the schedule needs it.
    """

    def __init__(self, rho: float, schedule: RhoSchedule, total_steps: int | None, name: str = "rho") -> None:
        if not rho >= 0:
            raise ValueError(f"{name} must not be negative, found {rho}")
        if schedule not in get_args(RhoSchedule):
            known = ", ".join(get_args(RhoSchedule))
            raise ValueError(f"unknown {name}_schedule '{schedule}'; known: {known}")
        if schedule in ("linear", "cosine", "growing_cosine") and not total_steps:
            raise ValueError(f"{name}_schedule '{schedule}' needs total_steps")
        self.rho, self.schedule, self.total_steps = rho, schedule, total_steps or 1

    def at(self, step: int, lr_share: float = 1.0) -> float:
        """The radius of step ``step``, counted from 0."""
        done = min(step / self.total_steps, 1.0)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": (1.0 + math.cos(math.pi * done)) / 2,
            "inv_sqrt": 1.0 / math.sqrt(step + 1),
            "growing_cosine": (1.0 - math.cos(math.pi * done)) / 2,
            "lr": lr_share,
        }
        return self.rho * factor[self.schedule]


def lr_share(groups: Sequence[Mapping[str, Any]]) -> float:
    """The first group's learning rate as a share of the one that its scheduler started from."""
    first = groups[0]
    initial = float(first.get("initial_lr", first["lr"]))
    return float(first["lr"]) / initial if initial else 0.0
