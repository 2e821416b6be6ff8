"""SAM sharpness against the trust-region solution of quadratics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flatbench.errors import InputError
from flatbench.measures.sam_sharpness import SAMSharpness
from tests.measures.measure_cases import subject
from tests.measures.quadratics import ball_maximum, known

SPECTRA = {
    "convex": [9.0, 5, 3, 2, 1, 0.5],
    "saddle": [9.0, 5, -3, 2, -8, 0.5],
    "one steep direction": [100.0, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slope", [3.0, 0.3])
@pytest.mark.parametrize("rho", [0.05, 0.5])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_many_steps_find_the_maximum_over_the_ball(
    spectrum: str, rho: float, slope: float, seed: int
) -> None:
    case = known(SPECTRA[spectrum], slope, seed)
    best = ball_maximum(case.curvature, case.gradient, rho)
    found = SAMSharpness(rho=rho, steps=200)(case.subject)
    assert found["sharpness"] == pytest.approx(best, rel=1e-3)
    assert found["perturbation_norm"] == pytest.approx(rho)
    few = SAMSharpness(rho=rho)(case.subject)
    assert 0.85 * best <= few["sharpness"] <= best * (1 + 1e-9)


def test_one_step_is_sams() -> None:
    case = known(SPECTRA["saddle"])
    found = SAMSharpness(rho=0.3, steps=5)(case.subject)
    e = 0.3 * case.gradient / case.gradient.norm()
    expected = case.gradient @ e + e @ case.curvature @ e / 2
    assert found["one_step"] == pytest.approx(float(expected), rel=1e-9)
    assert found["gradient_norm"] == pytest.approx(float(case.gradient.norm()))
    assert SAMSharpness(rho=0.3, steps=1)(case.subject)["sharpness"] == pytest.approx(found["one_step"])


def test_a_step_too_far_is_taken_back() -> None:
    """Concave along the gradient: SAM's step lands lower, the maximum lies inside the ball."""
    case = known([-10.0] * 6)
    inside = float(case.gradient.square().sum()) / 20  # at ε = g/10
    found = SAMSharpness(rho=float(case.gradient.norm()), steps=40)(case.subject)
    assert found["one_step"] < 0
    assert found["sharpness"] == pytest.approx(inside, rel=1e-3)
    assert found["perturbation_norm"] < found["rho"]


def test_no_rise_anywhere_is_zero() -> None:
    found = SAMSharpness()(known([-10.0] * 6, slope=0.0).subject)
    assert (found["sharpness"], found["best_step"], found["perturbation_norm"]) == (0.0, 0, 0.0)


def test_a_stationary_point_is_left_at_random() -> None:
    case = known(SPECTRA["convex"], slope=0.0)
    model = case.subject.model
    model.layer.weight.data.zero_()  # g = H·0 + b with b = −H·w: make b zero too
    model.slope.zero_()
    found = SAMSharpness(rho=0.5, steps=100)(case.subject)
    assert (found["gradient_norm"], found["one_step"]) == (0.0, 0.0)
    assert found["sharpness"] == pytest.approx(9 * 0.5**2 / 2, rel=1e-3)


@pytest.mark.slow
def test_never_below_one_step_and_grows_with_rho_and_steps() -> None:
    given = subject("vit_lora")
    for space in ("adapter", "merged", "all"):
        small, large = (SAMSharpness(space=space, rho=rho)(given) for rho in (0.05, 0.2))
        assert small["sharpness"] >= max(small["one_step"], 0)
        assert large["sharpness"] > small["sharpness"]
        assert SAMSharpness(space=space, steps=20)(given)["sharpness"] >= small["sharpness"]


def test_batching_does_not_matter() -> None:
    given = subject("vit_full")
    together = {key: torch.cat([b[key] for b in given.batches]) for key in given.batches[0]}
    ragged, whole = SAMSharpness()(given), SAMSharpness()(replace(given, batches=[together]))
    for key in ("loss", "gradient_norm", "one_step", "sharpness"):
        assert ragged[key] == pytest.approx(whole[key], rel=1e-9)


def test_result_keys() -> None:
    assert list(SAMSharpness()(subject("vit_lora"))) == [
        "sharpness",
        "sampling_error",
        "one_step",
        "best_step",
        "perturbation_norm",
        "loss",
        "gradient_norm",
        "rho",
        "steps",
        "gradients",
        "rounding_error",
        "below_resolution",
        "examples",
        "example_gradients",
        "resolved",
        "seconds",
        "space",
        "dimension",
        "precision",
    ]


def test_gradients_are_counted_right() -> None:
    given = subject("mlp_full")
    count = 0

    def loss(model, batch):
        nonlocal count
        count += torch.is_grad_enabled()
        return given.loss(model, batch)

    found = SAMSharpness(steps=4)(replace(given, loss=loss))
    assert found["gradients"] * len(given.batches) == count


@pytest.mark.parametrize(
    "options", [{"rho": 0.0}, {"rho": float("inf")}, {"steps": 0}, {"examples": -1}, {"space": "lora"}]
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SAMSharpness(**options)
