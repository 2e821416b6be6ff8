"""Methods whose gradients are taken at another point than the one that is evaluated and saved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flatbench.optim.base.buffers import Buffers
from flatbench.optim.base.wrapped import WrappedOptimizer


class TwoPoints(WrappedOptimizer):
    """A method with a point at which gradients are taken and one at which the model is evaluated and saved.

    `train` and `eval` move between the two, and transformers' Trainer and accelerate call them. They do not
    call them before everything that they save, so the model itself helps: the ``state_dict()`` of it and of
    every module in it, loading a state, a copy, and a forward pass in evaluation mode find the point of
    `eval`; the next forward pass in training mode goes back.

    Merging the adapter into the model cannot be noticed: call ``optimizer.eval()`` before.

    Attributes:
        away_when_training: whether it is in training that the weights are not where the base optimizer put
            them.
    """

    away_when_training: ClassVar[bool] = True
    moves_training_point: ClassVar[bool] = True

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.away = False
        #: a step and its radius, which may follow a learning rate that a scheduler changes after the step
        self._radius: tuple[int, float] | None = None
        super().__init__(base_optimizer, model)

    @property
    def has_two_points(self) -> bool:
        """Whether gradients are taken at another point than the one that is evaluated and saved."""
        return True

    @property
    def points_differ(self) -> bool:
        """Whether they are different ones by now."""
        return (self.away and self.away_when_training) or super().points_differ

    def _to_training(self) -> None:
        if self.away_when_training:
            self.modes.train()
            self._move_away()
        else:
            self._move_back()
            self.modes.train()

    def _to_evaluation(self) -> None:
        if self.away_when_training:
            self._move_back()
            self.modes.eval()
        else:
            self.modes.eval()
            self._move_away()

    @abstractmethod
    def _move_away(self) -> None:
        """Move the weights away from the base optimizer's point; nothing to do where they are away."""

    @abstractmethod
    def _move_back(self) -> None:
        """Move them back, bit by bit; nothing to do where they are there."""

    def _before_update(self) -> None:
        self._check_place()
        self._observe()
        self._move_back()

    def _observe(self) -> None:
        """Look at the gradients, at the point at which they were taken."""

    def _after_update(self) -> None:
        self.train()

    def _forget_step(self) -> None:
        self.train()

    def _put_down(self) -> None:
        self._move_back()

    def _fixed_radius(self, radius: float) -> float:
        """The radius that the step's first move away had: going there again must find the same point."""
        if self._radius is None or self._radius[0] != self.steps:
            self._radius = self.steps, radius
        return self._radius[1]

    def _own_state(self) -> dict[str, Any]:
        away = self.away or (self.away_when_training and self.point.returns)
        return {"away": away, "radius": None if self._radius is None else list(self._radius)}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        stored = own.get("radius")
        self._radius = None if stored is None else (int(stored[0]), float(stored[1]))


class Displaced(TwoPoints):
    """Weights that are moved by adding to them or replacing them, and put back from a copy."""

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._base_point: list[Tensor] | None = None
        self._buffers: Buffers | None = None
        super().__init__(base_optimizer, model)

    def _move_targets(self) -> list[Tensor]:
        """The parameters that move."""
        return self._parameters_of_groups

    def moved_parameters(self) -> list[Tensor]:
        """The parameters that differ between the two points."""
        return self._parameters_of_groups if self.modes.exist else self._move_targets()

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
    def _move_away(self) -> None:
        if self.away:
            return
        offset = self._offset()
        if offset is None:
            return
        self._base_point = self.layout.weights()
        self._set(offset)
        self.away = True

    @torch.no_grad()
    def _move_back(self) -> None:
        if self.away and self._base_point is not None:
            self.layout.copy_(self._base_point)
            self.away, self._base_point = False, None

    def _own_state(self) -> dict[str, Any]:
        # a model file may have been written at the other point, so the base optimizer's is kept here
        where = self._base_point if self.away and self._base_point is not None else self.layout.weights()
        return {**super()._own_state(), "base_point": [w.clone() for w in self.layout.unflatten(where)]}

    def _weights_of_training(self) -> list[Tensor] | None:
        weights = super()._weights_of_training()
        if weights is not None and self.away and self.away_when_training and self._base_point is not None:
            own = {id(p): w for p, w in self._pairs(self._base_point)}
            weights = [
                own[id(p)].clone() if id(p) in own else w
                for p, w in zip(self._parameters_of_groups, weights, strict=True)
            ]
        return weights

    def _pairs(self, buffers: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.layout.parameters, self.layout.unflatten(buffers), strict=True))

    @torch.no_grad()
    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        super()._load_own_state(own)
        self.away, self._base_point = False, None
        weights = self.layout.parameters
        torch._foreach_copy_(weights, self._convert_like(own["base_point"], weights))

    @staticmethod
    def _convert_like(stored: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        pairs = zip(stored, weights, strict=True)
        return [t.detach().to(device=w.device, dtype=w.dtype, copy=True) for t, w in pairs]
