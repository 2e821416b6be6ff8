"""What is cached of a checkpoint is of the function that it computes, not of its weights alone."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatbench import load_checkpoint
from flatbench.notebook.loss_key import loss_key

X = torch.randn(24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.activation, self.temperature = activation or nn.Tanh(), 1.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.norm(self.activation(self.first(x)))) / self.temperature
        return found


def value(model: nn.Module, **options: Any) -> float:
    opened = load_checkpoint(model, [(X, Y)], loss=nn.functional.cross_entropy)
    found = opened.hessian(space="all", interval=None, **options)["eigenvalue_1"]
    return float(found)


def relu(_: Net) -> nn.Module:
    return Net(nn.ReLU())


def hotter(model: Net) -> nn.Module:
    model.temperature = 2.0
    return model


def softer(model: Net) -> nn.Module:
    model.norm.eps = 1.0
    return model


@pytest.mark.parametrize("change", [relu, hotter, softer])
def test_another_function_of_the_same_weights(change: Callable[[Net], nn.Module]) -> None:
    model = Net()
    first = value(model)
    other = change(model)
    assert value(other) == value(other, cached=False)
    assert value(other) != pytest.approx(first, rel=1e-3)


def test_another_adapter_and_another_scale() -> None:
    def config(alpha: int) -> LoraConfig:
        return LoraConfig(r=2, lora_alpha=alpha, target_modules=["first"], init_lora_weights=False)

    torch.manual_seed(0)
    model = get_peft_model(Net(), config(2))
    model.add_adapter("second", config(2))
    values = []
    for change in (
        lambda: model.set_adapter("default"),
        lambda: model.set_adapter("second"),
        lambda: model.base_model.model.first.set_scale("second", 4.0),
    ):
        change()
        model.double()
        opened = load_checkpoint(model, [(X, Y)], loss=nn.functional.cross_entropy)
        found = opened.hessian(space="merged", interval=None)["eigenvalue_1"]
        again = opened.hessian(space="merged", interval=None, cached=False)["eigenvalue_1"]
        assert found == again
        values.append(found)
    assert len(set(values)) == 3


class Settings:
    """What a loss reads."""

    weight = 1.0


module = ModuleType("settings")
module.weight = 1.0  # type: ignore[attr-defined]
inside = {"weight": 1.0}


def by_class(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, torch.tensor([1.0, 1.0, Settings.weight]))


def by_module(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, torch.tensor([1.0, 1.0, module.weight]))


def by_nested(outputs: Tensor, targets: Tensor) -> Tensor:
    def weighted() -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, torch.tensor([1.0, 1.0, inside["weight"]]))

    return weighted()


class Weighted(nn.Module):
    """A criterion that reads its class and, in a method, what is around."""

    weight = 1.0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, torch.tensor([1.0, self.other(), self.weight]))

    @staticmethod
    def other() -> float:
        return inside["weight"]


@pytest.mark.parametrize("place", ["class", "module", "nested", "its class", "its method"])
def test_a_loss_is_what_it_reads_wherever_that_is(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key alone: of a changed loss it must not depend on whether its first rows show the change."""
    own = Weighted()
    functions = {"class": by_class, "module": by_module, "nested": by_nested}
    criterion: Any = functions.get(place, own)
    model = Net()
    first = loss_key(model, criterion, "rows")
    assert loss_key(model, criterion, "rows") == first
    if place in ("nested", "its method"):
        monkeypatch.setitem(inside, "weight", 9.0)
    else:
        held = {"class": Settings, "module": module, "its class": Weighted}[place]
        monkeypatch.setattr(held, "weight", 9.0)
    assert loss_key(model, criterion, "rows") != first
