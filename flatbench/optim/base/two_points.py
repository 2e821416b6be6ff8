"""Methods whose gradients are taken at another point than the one that is evaluated and saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flatbench.optim.base.buffers import Buffers
from flatbench.optim.base.wrapped import Closure, WrappedOptimizer

#: wrappers for parallel training; torch.compile's has its model as ``_orig_mod``
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class TwoPoints(WrappedOptimizer):
    """A method with a point at which gradients are taken and one at which the model is evaluated and saved.

    `train` and `eval` move between the two, and transformers' Trainer and accelerate call them. They do not
    call them before everything that they save, so the model itself helps: its ``state_dict()``, loading a
    state into it, and a forward pass in evaluation mode find the point of `eval`; the next forward pass in
    training mode goes back.

    Merging the adapter into the model cannot be noticed: call ``optimizer.eval()`` before.

    Attributes:
        away_when_training: whether it is in training that the weights are not where the base optimizer put
            them.
    """

    away_when_training: ClassVar[bool] = True

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        super().__init__(base_optimizer, model)
        self.away = False
        self._return_with_training = False
        _follow(self, model)

    def train(self) -> None:
        """Move the weights to the point at which gradients are taken."""
        self._return_with_training = False
        self._leave() if self.away_when_training else self._come_back()

    def eval(self) -> None:
        """Move the weights to the point at which a model is evaluated and saved, bit by bit."""
        self._return_with_training = False
        self._come_back() if self.away_when_training else self._leave()

    @abstractmethod
    def _leave(self) -> None:
        """Move the weights away from the base optimizer's point; nothing to do where they are away."""

    @abstractmethod
    def _come_back(self) -> None:
        """Move them back, bit by bit; nothing to do where they are there."""

    def _gradients_of(self, closure: Closure) -> Any:
        self.train()
        with torch.enable_grad():
            return closure()

    def _before_update(self) -> None:
        self._observe()
        self._come_back()

    def _observe(self) -> None:
        """Look at the gradients, at the point at which they were taken."""

    def _after_update(self) -> None:
        self.train()

    def _for_evaluation(self) -> None:
        """The model is about to be evaluated, saved or loaded; `eval` until it trains again."""
        training = self.away == self.away_when_training
        self.eval()
        self._return_with_training = training

    def _for_training(self) -> None:
        if self._return_with_training:
            self.train()


class Displaced(TwoPoints):
    """Weights that are moved by adding to them or replacing them, and put back from a copy."""

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        super().__init__(base_optimizer, model)
        self._base_point: list[Tensor] | None = None
        self._buffers: Buffers | None = None

    def _move_targets(self) -> list[Tensor]:
        """The parameters that move."""
        return [p for group in self.param_groups for p in group["params"]]

    @abstractmethod
    def _offset(self) -> list[Tensor] | None:
        """What is added to each; None to stay."""

    @property
    def layout(self) -> Buffers:
        """The parameters that move, laid end to end."""
        if self.away and self._buffers is not None:
            return self._buffers
        parameters = self._move_targets()
        if self._buffers is None or not self._buffers.fits(parameters):
            self._buffers = Buffers(parameters)
        return self._buffers

    def _set(self, offset: list[Tensor]) -> None:
        torch._foreach_add_(self.layout.parameters, offset)

    @torch.no_grad()
    def _leave(self) -> None:
        if self.away:
            return
        offset = self._offset()
        if offset is None:
            return
        self._base_point = self.layout.weights()
        self._set(offset)
        self.away = True

    @torch.no_grad()
    def _come_back(self) -> None:
        if self.away and self._base_point is not None:
            self.layout.copy_(self._base_point)
            self.away, self._base_point = False, None

    def _own_state(self) -> dict[str, Any]:
        # a model file may have been written at the other point, so the base optimizer's is kept here
        where = self._base_point if self.away and self._base_point is not None else self.layout.weights()
        return {"away": self.away, "base_point": [w.clone() for w in self.layout.unflatten(where)]}

    @torch.no_grad()
    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        self.away, self._base_point = False, None
        weights = self.layout.parameters
        torch._foreach_copy_(weights, self._convert_like(own["base_point"], weights))
        if own["away"]:
            self._leave()

    @staticmethod
    def _convert_like(stored: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        pairs = zip(stored, weights, strict=True)
        return [t.detach().to(device=w.device, dtype=w.dtype, copy=True) for t, w in pairs]


class _Follower:
    """Hooks of a model that tell its optimizer what the model is used for; a copy of the model has none.

    The model holds its optimizer by them: one that is saved after the training function returned must still
    find the way to its unperturbed point.
    """

    def __init__(self, optimizer: TwoPoints | None = None, model: nn.Module | None = None) -> None:
        self.optimizer, self.model = optimizer, model
        self.handles: list[RemovableHandle] = []

    def before_forward(self, module: nn.Module, *_: Any) -> None:
        if self.optimizer is None or module is not self.model:
            return
        if module.training:
            self.optimizer._for_training()
        else:
            self.before_state_dict(module)

    def before_state_dict(self, module: nn.Module, *_: Any) -> None:
        optimizer = self.optimizer
        if optimizer is None or module is not self.model:
            return
        if optimizer.away == optimizer.away_when_training:
            optimizer._for_evaluation()

    def __deepcopy__(self, memo: Any) -> _Follower:
        return _Follower()

    def __reduce__(self) -> Any:
        return (_Follower, ())


def _follow(optimizer: TwoPoints, model: nn.Module) -> None:
    # the innermost model, which is what every wrapper calls in the end, and what generation calls
    inner: Any = model
    while isinstance(inner, _PARALLEL) or hasattr(inner, "_orig_mod"):
        inner = inner.module if isinstance(inner, _PARALLEL) else inner._orig_mod
    if callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    for hook in list(inner._forward_pre_hooks.values()):
        earlier = getattr(hook, "__self__", None)
        if isinstance(earlier, _Follower):  # an optimizer of an earlier training
            if earlier.optimizer is not None and earlier.model is inner:
                earlier.optimizer.eval()
            for handle in earlier.handles:
                handle.remove()
    follower = _Follower(optimizer, inner)
    follower.handles = [
        inner.register_forward_pre_hook(follower.before_forward),
        inner.register_state_dict_pre_hook(follower.before_state_dict),
        inner.register_load_state_dict_pre_hook(follower.before_state_dict),
    ]
