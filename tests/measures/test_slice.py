"""Slices against closed forms, and the norms of filter-normalised directions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.slice import Slice
from flatbench.seeding import derive_seed
from flatbench.subject.directions import filter_axis, filter_normalised, random_direction
from flatbench.subject.spaces import in_space
from tests.measures.measure_cases import subject
from tests.measures.quadratics import known


@pytest.mark.parametrize("normalisation", ["filter", "layer", "none"])
def test_a_quadratic_gives_parabolas(normalisation: str) -> None:
    case = known([9.0, 5, -3, 2, 1, 0.5])
    found = Slice(normalisation=normalisation, distance=2.0, points=9, directions=2)(case.subject)
    rises = []
    for j, losses in enumerate(found["losses"]):
        with in_space(case.subject, "merged") as point:
            line = random_direction(point, normalisation, derive_seed(5, "slice", j))[0].flatten()
        bend = line @ case.curvature @ line
        expected = [
            float(found["loss"] + t * case.gradient @ line + t * t * bend / 2) for t in found["positions"]
        ]
        assert losses == pytest.approx(expected, rel=1e-9, abs=1e-9)
        rises.append(float(bend))
    mean = sum(rises) / 2
    assert found["curvature"] == pytest.approx(mean)
    assert found["mean_rise"] == pytest.approx(mean * 2)
    assert found["mean_rise_half"] == pytest.approx(mean / 2)


def test_positions_and_the_exact_loss_in_the_middle() -> None:
    found = Slice(distance=0.5, points=5)(subject("vit_lora"))
    assert found["positions"] == [-0.5, -0.25, 0.0, 0.25, 0.5]
    assert len(found["losses"]) == 3
    assert all(losses[2] == found["loss"] for losses in found["losses"])


def test_half_distance_only_where_it_is_a_position() -> None:
    given = subject("mlp_full")
    assert Slice(points=7)(given)["mean_rise_half"] is None
    assert Slice(points=9)(given)["mean_rise_half"] is not None


def test_at_a_minimum_the_middle_is_the_lowest() -> None:
    case = known([9.0, 5, 3, 2, 1, 0.5], slope=0.0)
    found = Slice()(case.subject)
    assert all(min(losses) == found["loss"] for losses in found["losses"])


@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
@pytest.mark.parametrize("name", ["vit_head", "gpt2_lora"])
def test_filters_of_the_direction_have_the_norms_of_the_weights(name: str, space: str) -> None:
    with in_space(subject(name), space) as point:
        direction = random_direction(point, "filter", 0)
        for (key, weight), part in zip(point.parameters.items(), direction, strict=True):
            if weight.ndim < 2:
                assert torch.equal(part, torch.zeros_like(part))
                continue
            transposed = name == "gpt2_lora" and ".c_" in key and "lora" not in key
            rows = (lambda t: t.T) if transposed else (lambda t: t.flatten(1))
            torch.testing.assert_close(rows(part).norm(dim=1), rows(weight.detach()).norm(dim=1))


def test_layer_and_unit_normalisation() -> None:
    with in_space(subject("vit_lora"), "merged") as point:
        layer = random_direction(point, "layer", 0)
        for part, weight in zip(layer, point.parameters.values(), strict=True):
            torch.testing.assert_close(part.norm(), weight.detach().norm())
        unit = random_direction(point, "none", 0)
        assert sum(float(p.square().sum()) for p in unit) == pytest.approx(1)


def test_filter_axes() -> None:
    from transformers.pytorch_utils import Conv1D

    assert (
        filter_axis(nn.Linear(2, 3))
        == filter_axis(nn.Conv2d(2, 3, 1))
        == filter_axis(nn.Embedding(2, 3))
        == 0
    )
    assert filter_axis(Conv1D(3, 2)) == filter_axis(nn.ConvTranspose2d(2, 3, 1)) == 1


def test_a_zero_filter_stays() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = filter_normalised(torch.ones(2, 2), weight, 0)
    torch.testing.assert_close(found.norm(dim=1), torch.tensor([5.0, 0.0]))


def test_two_methods_share_the_directions_before_scaling() -> None:
    parts = []
    for name in ("vit_lora", "vit_full"):
        with in_space(subject(name), "merged") as point:
            parts.append(random_direction(point, "none", 4))
            assert all(bool(p.any()) for p in parts[-1])
    for left, right in zip(*parts, strict=True):
        torch.testing.assert_close(left, right)


def test_directions_differ_among_themselves_and_between_seeds() -> None:
    from dataclasses import replace

    given = subject("mlp_full")
    found, other = Slice(points=3)(given), Slice(points=3)(replace(given, seed=12))
    rows = [tuple(losses) for losses in (*found["losses"], *other["losses"])]
    assert len(set(rows)) == 6


def test_result_keys() -> None:
    assert list(Slice(points=5)(subject("vit_lora"))) == [
        "mean_rise",
        "rounding_error",
        "below_resolution",
        "mean_rise_half",
        "curvature",
        "curvature_rounding_error",
        "loss",
        "direction_norm",
        "seconds",
        "examples",
        "space",
        "dimension",
        "precision",
        "positions",
        "losses",
    ]


def test_a_loss_that_overflows_says_where() -> None:
    case = known([9.0, 5, 3, 2, 1, 0.5])
    with pytest.raises(FlatbenchError, match=r"at position -1e\+200"):
        Slice(distance=1e200)(case.subject)


def test_weights_all_zero_have_no_filter_directions() -> None:
    case = known([9.0, 5, 3, 2, 1, 0.5])
    case.subject.model.layer.weight.data.zero_()
    with pytest.raises(NotApplicableError, match="filter-normalised directions vanish"):
        Slice()(case.subject)


@pytest.mark.parametrize(
    "options", [{"points": 4}, {"points": 1}, {"distance": 0.0}, {"directions": 0}, {"normalisation": "row"}]
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Slice(**options)
