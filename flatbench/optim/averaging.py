"""Averages of the weights along training, evaluated and saved in the last weights' place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from flatbench.optim.base.options import Every, TotalSteps
from flatbench.optim.base.two_points import Displaced


class _WeightAverage(Displaced):
    """Trains as the base optimizer does; `eval` puts the average of the trained parameters in their place.

    Running statistics of batch normalisation stay those of the last weights: see
    `torch.optim.swa_utils.update_bn`.
    """

    away_when_training: ClassVar[bool] = False
    moves_training_point: ClassVar[bool] = False
    hands_closure_on: ClassVar[bool] = True
    averages: ClassVar[bool] = True

    def __init__(self, base_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self._average: list[Tensor] | None = None
        self._count = 0
        super().__init__(base_optimizer, model)

    @abstractmethod
    def _rule(self) -> Callable[..., None]:
        """torch's rule: average, weights and their count -> the average in place."""

    def _due(self) -> bool:
        """Whether the weights of the step that was just made enter the average."""
        return True

    def _after_update(self) -> None:
        if not self._due():
            return
        self.modes.eval()  # of a base with two points, those of the one that is evaluated
        self._take_in(self.layout.parameters)
        self.modes.train()

    def _take_in(self, weights: list[Tensor]) -> None:
        if self._average is None:
            self._average = [weight.clone() for weight in weights]
        else:
            for weight in weights[len(self._average) :]:  # of a group that was added
                self._average.append(weight.clone())
            self._rule()(self._average, weights, self._count)
        self._count += 1

    def _offset(self) -> list[Tensor] | None:
        if self._average is None:
            return None
        return [*self._average, *self.layout.parameters[len(self._average) :]]

    def _set(self, offset: list[Tensor]) -> None:
        torch._foreach_copy_(self.layout.parameters, offset)

    @torch.no_grad()
    def _move_back(self) -> None:
        if self.away and self._average is not None and not self._is_average():
            # somebody loaded or edited the weights that are evaluated: all goes on from them
            self._average = [weight.clone() for weight in self.layout.parameters]
            self._count = 1
            self.away, self._base_point = False, None
            return
        super()._move_back()

    def _is_average(self) -> bool:
        """Whether the weights are the average, to the bit or as a file in half precision has it."""
        assert self._average is not None
        pairs = list(zip(self.layout.parameters, self._average, strict=False))
        kinds = (None, torch.bfloat16, torch.float16)
        return any(
            all(
                torch.equal(weight, mean if kind is None else mean.to(kind).to(mean))
                for weight, mean in pairs
            )
            for kind in kinds
        )

    def _own_state(self) -> dict[str, Any]:
        averaged = None if self._average is None else [value.clone() for value in self._average]
        if self.point.training:
            self.modes.eval()
        own = {**super()._own_state(), "averaged": averaged, "count": self._count}
        if self.point.training:
            self.modes.train()
        return own

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        stored = own["averaged"]
        self._average = (
            None if stored is None else self._convert_like(stored, self._move_targets()[: len(stored)])
        )
        self._count = own["count"]
        super()._load_own_state(own)


class SWA(_WeightAverage):
    """SWA: the equal average of the weights over the last part of training (arXiv 1803.05407).

    Made by torch's own ``torch.optim.swa_utils``. Before the averaging starts, `eval` finds the last weights.

    Args:
        base_optimizer: makes the update.
        model: the model.
        start: share of ``total_steps`` after which weights enter the average, in [0, 1).
        every: steps between two that enter.
        total_steps: steps of the whole training; needed unless ``start`` is 0.

    Raises:
        ValueError: start is outside [0, 1), or ``total_steps`` is missing.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        start: Annotated[float, Field(ge=0, lt=1)] = 0.75,
        every: Every = 1,
        total_steps: TotalSteps = None,
    ) -> None:
        if not 0 <= start < 1:
            raise ValueError(f"start must be in [0, 1), found {start}")
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        if start and not total_steps:
            raise ValueError("swa needs total_steps to know when its averaging starts; or set start to 0")
        self.every, self.total_steps = every, total_steps or 0
        self.first_step = int(start * self.total_steps)
        super().__init__(base_optimizer, model)

    def _rule(self) -> Callable[..., None]:
        rule: Callable[..., None] = get_swa_multi_avg_fn()
        return rule

    def _due(self) -> bool:
        # counted back from the end, so that the last weights enter
        return self.steps > self.first_step and (self.total_steps - self.steps) % self.every == 0


class EMA(_WeightAverage):
    """EMA: an exponential moving average of the weights.

    Made by torch's own ``torch.optim.swa_utils``: ``average ← decay·average + (1 - decay)·w``, from the
    weights after the first step on.

    Args:
        base_optimizer: makes the update.
        model: the model.
        decay: weight of the old average, in [0, 1].

    Raises:
        ValueError: decay is outside [0, 1].
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        decay: Annotated[float, Field(ge=0, le=1)] = 0.999,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], found {decay}")
        self.decay = decay
        super().__init__(base_optimizer, model)

    def _rule(self) -> Callable[..., None]:
        rule: Callable[..., None] = get_ema_multi_avg_fn(self.decay)
        return rule
