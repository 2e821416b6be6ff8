"""What every registered measure must do, whatever it measures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import measures
from flatbench.errors import FlatbenchError, NotApplicableError
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import mean_loss, same, snapshot, subject

NAMES = measures.REGISTRY.names()
MODELS = ["vit_head", "bert_lora", "vit_full", "mlp_full"]


class Broken(Exception):
    pass


def measure(name: str, given: Subject) -> dict[str, Any]:
    try:
        return measures.REGISTRY.load(name)()(given)
    except NotApplicableError as reason:
        assert str(reason)
        pytest.skip(str(reason))


def timeless(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "seconds"}


@pytest.mark.parametrize("name", NAMES)
def test_described_in_one_line(name: str) -> None:
    assert measures.REGISTRY.describe(name).endswith(".")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "spectrum")) for name in NAMES]
)
def test_same_numbers_twice_jsonable_and_model_as_found(name: str, model: str) -> None:
    given = subject(model)
    before = snapshot(given.model)
    first = measure(name, given)
    assert same(before, snapshot(given.model))
    with torch.no_grad():  # neither the global random state nor the caller's grad mode matters
        torch.rand(1)
        again = measure(name, given)
    assert timeless(first) == timeless(again)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    scalars = [v for v in first.values() if not isinstance(v, list)]
    assert all(v is None or isinstance(v, bool | int | float | str) for v in scalars)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("calls", [1, 5])
def test_an_exception_leaves_the_model_as_found(name: str, calls: int) -> None:
    count = 0

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        nonlocal count
        count += 1
        torch.rand(1)
        if count == calls:
            raise Broken
        return mean_loss(model, batch)

    given = replace(subject("vit_full"), loss=loss)
    before = snapshot(given.model)
    try:
        measure(name, given)
    except Broken:
        pass
    else:
        assert count < calls  # a measure that asks for fewer losses, or for none
    assert same(before, snapshot(given.model))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_is_not_finite_is_an_error(name: str) -> None:
    asked = []

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        asked.append(True)
        value, terms = mean_loss(model, batch)
        return value * float("nan"), terms

    given = replace(subject("mlp_full"), loss=loss)
    if timeless(measure_or_error(name, given)) != {}:
        assert not asked or name == "cost"  # whose numbers are those of the training


def measure_or_error(name: str, given: Subject) -> dict[str, Any]:
    try:
        return measure(name, given)
    except FlatbenchError as error:
        assert "nan" in str(error)
        return {}


@pytest.mark.parametrize("name", [n for n in NAMES if "space" in measures.REGISTRY.options(n).model_fields])
def test_no_adapter_space_without_an_adapter(name: str) -> None:
    with pytest.raises(NotApplicableError, match="no adapter"):
        measures.REGISTRY.load(name)(space="adapter")(subject("vit_full"))
