"""Sharpness within balls against quadratics, and its invariances on LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flatbench.errors import InputError, NotApplicableError
from flatbench.measures.ascent import checkpoints
from flatbench.measures.gauge import balanced
from flatbench.measures.sharpness import Sharpness
from flatbench.models import factors as lora
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import same, snapshot, subject
from tests.measures.quadratics import ball_maximum, known

SPECTRA = {"convex": [9.0, 5, 3, 2, 1, 0.5], "saddle": [9.0, 5, -3, 2, -8, 0.5]}


def gauged(given: Subject) -> Subject:
    """The same model with other factors."""
    mixing = torch.tensor([[3.0, 1.0], [0.0, 0.5]]).double()
    with torch.no_grad():
        for factors in lora.lora_factors(given.model):
            factors.B.copy_(factors.B @ mixing)
            factors.A.copy_(torch.linalg.solve(mixing, factors.A))
    return given


@pytest.mark.parametrize("rho", [0.05, 0.5])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_worst_case_in_l2_is_the_trust_region_solution(spectrum: str, rho: float) -> None:
    case = known(SPECTRA[spectrum], 1.0)
    best = ball_maximum(case.curvature, case.gradient, rho)
    found = Sharpness(rho=[rho], m=None, steps=100, restarts=3)(case.subject)
    assert found["sharpness"] == pytest.approx(best, rel=1e-3)
    assert 0.8 * best <= Sharpness(rho=[rho], m=None)(case.subject)["sharpness"] <= best * (1 + 1e-9)


def test_the_worst_case_in_linf_is_at_a_corner() -> None:
    case = known(SPECTRA["convex"], 1.0)
    corners = torch.cartesian_prod(*[torch.tensor([-0.1, 0.1]).double()] * 6)
    rises = corners @ case.gradient + ((corners @ case.curvature) * corners).sum(dim=1) / 2
    found = Sharpness(rho=[0.1], m=None, norm="linf", steps=50, restarts=5)(case.subject)
    assert found["sharpness"] == pytest.approx(float(rises.max()), rel=1e-3)


def test_the_adaptive_ball_is_the_plain_one_of_scaled_weights() -> None:
    case = known(SPECTRA["convex"], 1.0)
    scale = torch.diag(case.weight.abs() + 0.01 * case.weight.square().mean().sqrt())
    best = ball_maximum(scale @ case.curvature @ scale, scale @ case.gradient, 0.3)
    found = Sharpness(rho=[0.3], m=None, metric="adaptive", steps=100, restarts=3)(case.subject)
    assert found["sharpness"] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_average_case_of_a_quadratic(norm: str) -> None:
    case = known(SPECTRA["saddle"], 1.0)
    variance = 0.2**2 if norm == "l2" else 0.2**2 / 3
    expected = variance * float(case.curvature.trace()) / 2
    found = Sharpness(kind="average", norm=norm, rho=[0.2], m=None, samples=400)(case.subject)
    assert abs(found["sharpness"] - expected) <= 3 * found["standard_error_1"]
    assert found["standard_error_1"] < 0.3 * abs(expected) + 0.02


def test_zero_weights_move_in_the_adaptive_ball() -> None:
    given = subject("vit_lora")
    with torch.no_grad():
        for factors in lora.lora_factors(given.model):
            factors.B.zero_()
    options: Any = {"space": "adapter", "metric": "adaptive", "rho": [1.0]}
    assert Sharpness(**options)(given)["sharpness"] > 0
    still = Sharpness(**options, floor=0.0)(given)["sharpness"]
    assert still == pytest.approx(0, abs=1e-12)  # A alone moves nothing while B is zero


def sharpness(given: Subject, **options: Any) -> float:
    return Sharpness(rho=[0.1], steps=8, **options)(given)["sharpness"]


@pytest.mark.parametrize(
    ("options", "invariant"),
    [
        ({"space": "merged"}, True),
        ({"space": "merged", "metric": "adaptive"}, True),
        ({"space": "adapter"}, False),
        ({"space": "adapter", "metric": "adaptive"}, False),
        ({"space": "adapter", "gauge": "balanced"}, True),
        ({"space": "adapter", "metric": "invariant"}, True),
    ],
)
def test_what_sees_the_gauge_and_what_does_not(options: Any, invariant: bool) -> None:
    plain, other = (
        sharpness(subject("vit_lora"), **options),
        sharpness(gauged(subject("vit_lora")), **options),
    )
    if invariant:
        assert plain == pytest.approx(other, rel=1e-6)
    else:
        assert plain != pytest.approx(other, rel=0.02)


def test_the_balanced_gauge() -> None:
    given = gauged(subject("vit_lora"))
    before = snapshot(given.model)
    with in_space(given, "adapter") as point:
        outside = point.model(**given.batches[0]).logits
        with balanced(point):
            torch.testing.assert_close(point.model(**given.batches[0]).logits, outside)
            for factors in lora.lora_factors(point.model):
                torch.testing.assert_close(factors.B.T @ factors.B, factors.A @ factors.A.T)
    assert same(before, snapshot(given.model))
    with torch.no_grad():
        lora.lora_factors(given.model)[0].B.zero_()
    with pytest.raises(NotApplicableError, match="no balanced gauge"):
        sharpness(given, space="adapter", gauge="balanced")


def test_scaling_the_logits_does_not_matter_once_they_are_normalised() -> None:
    def scaled(factor: float) -> Subject:
        given = subject("mlp_full")
        with torch.no_grad():
            given.model.last.weight.mul_(factor)
            given.model.last.bias.mul_(factor)
        return given

    values = [
        Sharpness(rho=[0.3], metric="adaptive", floor=0.0, normalise_logits=normalise)(scaled(factor))[
            "sharpness"
        ]
        for normalise in (True, False)
        for factor in (1.0, 4.0)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[2] != pytest.approx(values[3], rel=0.1)


def test_radii_batches_and_gradients() -> None:
    found = Sharpness(rho=[0.02, 0.1, 0.5], steps=5, m=4)(subject("vit_full"))
    assert found["sharpness"] == found["sharpness_1"] <= found["sharpness_2"] <= found["sharpness_3"]
    assert found["batches"] == 4  # 5 + 5 + 3 examples, four at a time whatever batches they came in
    assert found["gradients"] == 4 + 3 * 5 * 4
    assert found["examples"] == 13


def test_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(100)[:4] == [22, 41, 57, 70]


def test_sharpness_per_batch_is_above_that_of_the_whole() -> None:
    given = subject("vit_full")
    assert sharpness(given, m=2) >= sharpness(given, m=None)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rho": [0.0]}, InputError),
        ({"norm": "l1"}, InputError),
        ({"steps": 0}, InputError),
        ({"metric": "invariant", "space": "merged"}, NotApplicableError),
        ({"metric": "invariant", "space": "adapter", "norm": "linf"}, NotApplicableError),
        ({"gauge": "balanced", "space": "merged"}, NotApplicableError),
    ],
)
def test_what_cannot_be(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Sharpness(**options)(subject("vit_lora"))


def test_logits_of_another_loss_are_not_normalised() -> None:
    given = subject("gpt2_lora")
    with pytest.raises(NotApplicableError, match="one label"):
        Sharpness(normalise_logits=True)(given)
