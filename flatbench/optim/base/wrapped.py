"""A `torch.optim.Optimizer` around a base optimizer."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flatbench.errors import InputError
from flatbench.optim.base.closures import (
    ClosureWatch,
    mark_elsewhere,
    mark_spent,
    mark_zero,
    taken_elsewhere,
)
from flatbench.optim.base.follower import Follower, follow, take_over
from flatbench.optim.base.modes import BaseModes, asks_closure, check_base, is_method
from flatbench.optim.base.point import Point

Closure = Callable[[], Any]

#: where a method keeps its own state in `state_dict`, beside the base optimizer's
EXTRA = "flatbench"

#: not copied, as by torch's own optimizers: hooks and what a scheduler put around `step` hold the original
_NOT_COPIED = ("step", "_opt_called")


class WrappedOptimizer(torch.optim.Optimizer):
    """A training method around ``base_optimizer``, which makes the update.

    Parameter groups and state are the base optimizer's own, so schedulers work on either. Hooks of the base
    optimizer's ``step`` run right before and after the update: with two gradients a step, clipping in a
    step-pre-hook of the base clips the second one. Where the base optimizer has two points of its own
    (`train` and `eval`), those of the method reach it.

    Args:
        base_optimizer: any torch optimizer over the parameters to train, another method included.
        model: the model that holds them.

    Attributes:
        gradients_per_step: how often a step asks the closure, on average.
        needs_adapter: whether the method has no meaning without LoRA factors.
        hands_closure_on: whether the base optimizer may ask the closure, because the method does not.
        moves_training_point: whether gradients are taken elsewhere than at the base optimizer's point.
        averages: whether another point than the base optimizer's is evaluated.
        writes_weights: whether it changes weights for good, which the base optimizer then goes on from.
        skipped_perturbations: steps whose gradient was zero or not finite, so that nothing was perturbed.

    Raises:
        InputError: the method cannot be put around this base optimizer.
    """

    gradients_per_step: float = 1
    needs_adapter: ClassVar[bool] = False
    hands_closure_on: ClassVar[bool] = False
    moves_training_point: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    writes_weights: ClassVar[bool] = False

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        check_base(self, base_optimizer)
        self.base = base_optimizer
        self.model = model
        self.modes = BaseModes(base_optimizer)
        self.asks_closure = asks_closure(base_optimizer)
        self.point = Point()
        self._follower: Follower | None = None
        #: whether the closure's gradients were added to those of earlier micro-batches
        self._accumulates = False
        #: hooks that look where the gradient of a parameter is taken
        self._place_hooks: dict[int, Any] = {}
        self._norm = torch.tensor(float("nan"))
        self.skipped_perturbations: Tensor | int = 0
        self.steps, self.stepping = 0, False
        groups, state = base_optimizer.param_groups, base_optimizer.state
        self._initializing = True
        super().__init__(groups, dict(getattr(base_optimizer, "defaults", {})))
        self._initializing = False
        self.param_groups, self.state = groups, state
        if self.asks_closure:
            self.gradients_per_step = getattr(base_optimizer, "gradients_per_step", 1)
        if self.has_two_points:
            self._watch_place()
            follow(self, model)
        else:
            take_over(self)

    @property
    def has_two_points(self) -> bool:
        """Whether gradients are taken at another point than the one that is evaluated and saved."""
        return self.modes.exist

    @property
    def points_differ(self) -> bool:
        """Whether they are different ones by now."""
        if self.modes.foreign:
            return self.steps > 0
        return self.modes.exist and bool(self.modes.base.points_differ)

    def _watch_place(self) -> None:
        point = self.point

        def look(p: Tensor) -> None:
            if not point.training and p.grad is not None:
                mark_elsewhere(p.grad)

        for p in self._parameters_of_groups:
            if id(p) not in self._place_hooks and p.requires_grad and p.is_leaf:
                self._place_hooks[id(p)] = p.register_post_accumulate_grad_hook(look)

    def let_go(self) -> None:
        """Another optimizer takes over the model: its gradients are not looked at any more."""
        self._follower = None
        for handle in self._place_hooks.values():
            handle.remove()
        self._place_hooks = {}

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
        if not self._initializing:
            with contextlib.suppress(AttributeError):  # read only in a wrapper of others
                self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        if not self._initializing:
            with contextlib.suppress(AttributeError):
                self.base.state = state

    @property
    def _parameters_of_groups(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        if self._initializing:  # the groups are the base optimizer's already
            return
        self.base.add_param_group(param_group)
        if self._follower is not None:
            self._watch_place()
            follow(self, self.model)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)
        if not set_to_none:
            mark_zero(self._parameters_of_groups)

    @property
    def gradients_of_next_step(self) -> int:
        """How often the next step asks the closure."""
        return int(getattr(self.base, "gradients_of_next_step", 1))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update with the closure's gradients, or with those that are there.

        Raises:
            InputError: the gradients are not those of the step: somebody's before the closure's, or taken at
                another point than the method's.
        """
        loss = None
        if self.asks_closure:
            self.train()
        else:
            if closure is not None:
                loss = self._gradients_of(closure)
            self._before_update()
        self.stepping = True
        try:
            if self.asks_closure:
                with self.point.hold():
                    loss = self.base.step(closure)
            else:
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

    def _gradients_of(self, closure: Closure) -> Any:
        self.train()
        watch = ClosureWatch(self._parameters_of_groups)
        with self.point.hold(), watch, torch.enable_grad():
            loss = closure()
        watch.check(type(self).__name__, allow_accumulation=True)
        self._accumulates = watch.added
        return loss

    def _before_update(self) -> None:
        """What happens between the gradients and the base optimizer's step."""
        self._check_place()

    def _check_place(self) -> None:
        """Go to the point of training; raise InputError if gradients were taken at the other one."""
        if not self.has_two_points:
            return
        self.train()
        if self.points_differ and any(taken_elsewhere(p) for p in self._parameters_of_groups):
            raise InputError(
                f"{type(self).__name__}: gradients were taken at the point at which the model is evaluated; "
                "call optimizer.train() after optimizer.eval(), train in training mode (model.train()), or "
                "take the gradients in a closure, step(closure)"
            )

    def _after_update(self) -> None:
        """What happens after the base optimizer's step, which is counted already."""

    def _forget_step(self) -> None:
        """Forget what a step that failed had begun."""

    def before_pass(self) -> None:
        """The model begins a forward pass in training mode."""

    # -- the two points -----------------------------------------------------------------------------------

    def train(self) -> None:
        """Move the weights to the point at which gradients are taken."""
        if self._inner_optimizer is not None:
            self._inner_optimizer.train()
            return
        self.point.training, self.point.returns = True, False
        with torch.inference_mode(False), torch.no_grad():
            self._to_training()

    def eval(self) -> None:
        """Move the weights to the unperturbed point, at which a model is evaluated and saved."""
        if self._inner_optimizer is not None:
            self._inner_optimizer.eval()
            return
        self.point.training = self.point.returns = False
        with torch.inference_mode(False), torch.no_grad():
            self._to_evaluation()

    @property
    def _inner_optimizer(self) -> Any:
        """The optimizer itself, where this is Lightning's wrapper, which has its class and not its state."""
        return None if "point" in vars(self) else vars(self)["_optimizer"]

    def _to_training(self) -> None:
        self.modes.train()

    def _to_evaluation(self) -> None:
        self.modes.eval()

    def for_evaluation(self) -> None:
        """The model is about to be evaluated, saved or loaded: `eval` until it trains again."""
        if self.point.training:
            self.eval()
            self.point.returns = True

    def for_training(self) -> None:
        """The model is about to be trained."""
        if self.point.returns:
            self.train()

    @contextlib.contextmanager
    def at_evaluation(self) -> Iterator[None]:
        """Inside, the weights are at the point of evaluation; what is copied there goes back by itself."""
        training = self.point.training
        self.for_evaluation()
        try:
            yield
        finally:
            if training:
                self.train()

    def moved_parameters(self) -> list[Tensor]:
        """The parameters that differ between the two points."""
        return self._parameters_of_groups

    # -- state and copies ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and, under ``"flatbench"``, the method's own; right in either mode."""
        with torch.inference_mode(False), torch.no_grad():
            own = {
                "method": type(self).__name__,
                "steps": self.steps,
                "skipped_perturbations": int(self.skipped_perturbations),
                "perturbation_norm": self.perturbation_norm.detach().clone(),
            }
            of_base = self.base.state_dict()
            if EXTRA in of_base:
                own["base"] = of_base[EXTRA]
            # a foreign base computes one of its points from the other, which rounds
            weights = self._weights_of_training()
            if weights is not None:
                own["weights_of_training"] = weights
            return {**of_base, EXTRA: own | self._own_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave. Raises ValueError if it is not a state of this method.

        The next forward pass in training mode, or `train`, goes to the point at which gradients are taken;
        until then the weights may be loaded, before or after.
        """
        if EXTRA not in state_dict:
            raise ValueError(f"not a state of {type(self).__name__}: it has no part named '{EXTRA}'")
        own = state_dict[EXTRA]
        if own["method"] != type(self).__name__:
            raise ValueError(f"not a state of {type(self).__name__}: it is one of {own['method']}")
        of_base = {key: value for key, value in state_dict.items() if key != EXTRA}
        if "base" in own:
            of_base[EXTRA] = own["base"]
        with torch.inference_mode(False), torch.no_grad():
            self._put_down()
            self.base.load_state_dict(of_base)
            self.steps, self.skipped_perturbations = own["steps"], own["skipped_perturbations"]
            self._norm = own["perturbation_norm"]
            self._load_own_state(own)
            if "weights_of_training" in own:
                self.modes.put_weights_of_training(own["weights_of_training"])
        self.eval()
        self.point.returns = True

    def _put_down(self) -> None:
        """Give up what was added to the weights, before others are loaded."""

    def _weights_of_training(self) -> list[Tensor] | None:
        """All weights of a foreign base with two points, at that of training; None without one."""
        if not self.modes.foreign:
            return None
        kept = self.modes.weights_of_training()
        return [p.detach().clone() for p in self._parameters_of_groups] if kept is None else kept

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy at the point of evaluation, which goes back to that of training as the original would."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        with self.at_evaluation():
            made.__setstate__(copy.deepcopy(self._state_to_copy(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        self.for_evaluation()
        return self._state_to_copy()

    def _state_to_copy(self) -> dict[str, Any]:
        kept = {
            name: value
            for name, value in self.__dict__.items()
            if name not in _NOT_COPIED and not name.startswith("_optimizer_")
        }
        kept["point"] = replace(self.point, training=False, held=False)
        kept["_place_hooks"] = {}
        # of an optimizer torch copies groups and state alone, and those of others have more
        kept["_more_of_base"] = {
            name: value
            for name, value in ({} if is_method(self.base) else vars(self.base)).items()
            if name not in (*_NOT_COPIED, "defaults", "state", "param_groups")
            and not name.startswith("_optimizer_")
        }
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        more = state.pop("_more_of_base")
        super().__setstate__(state)
        for name, value in more.items():
            vars(self.base).setdefault(name, value)
        if self._follower is not None:
            self._follower.serve(self)
            self._watch_place()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"
