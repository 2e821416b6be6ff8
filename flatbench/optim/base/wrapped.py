"""A `torch.optim.Optimizer` around a base optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

Closure = Callable[[], Any]

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
