"""Adaptive refinement: where exact points go, that the estimated error holds, and what is marked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flatbench.landscape import landscape
from flatbench.landscape.adaptive import Place, coarse, interpolate, refine
from tests.measures.measure_cases import subject
from tests.measures.quadratics import known

SHAPE = (25, 25)


def grid(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    x, y = np.meshgrid(np.linspace(-1, 1, 25), np.linspace(-1, 1, 25), indexing="ij")
    return function(x, y)[..., None]


SURFACES = {
    "bowl": lambda x, y: x**2 + 3 * y**2 + x * y,
    "saddle with an edge": lambda x, y: np.abs(x + 0.3 * y) + 0.2 * x,
    "cliff": lambda x, y: np.log1p(np.exp(12 * (x - 0.3) + 4 * y)) / 6 + 0.1 * y**2,
    "narrow valley": lambda x, y: np.sqrt(0.01 + (y - x**2) ** 2),
}


@pytest.mark.parametrize("name", SURFACES)
def test_the_true_error_stays_within_the_tolerance(name: str) -> None:
    surface = grid(SURFACES[name])
    asked: list[Place] = []

    def evaluate(places: list[Place]) -> np.ndarray:
        asked.extend(places)
        return np.array([surface[p] for p in places])

    found = refine(SHAPE, evaluate, [0], 0.01)
    assert len(set(asked)) == len(asked) == found.computed.sum()
    span = np.ptp(surface)
    true = np.abs(found.values - surface)
    assert true.max() <= 0.015 * span  # an estimate is no bound; it is held to half as much again
    assert found.errors.max() <= 0.01 * span
    assert (found.errors[found.computed] == 0).all()
    assert (true[found.computed] == 0).all()
    assert len(asked) < 0.7 * surface.size


def test_a_smooth_bowl_takes_few_points_and_an_edge_draws_them() -> None:
    counts = {}
    for name in ("bowl", "saddle with an edge"):
        surface = grid(SURFACES[name])
        found = refine(SHAPE, lambda places, s=surface: np.array([s[p] for p in places]), [0], 0.01)
        counts[name] = found.computed.sum()
        if name != "bowl":
            x, y = np.meshgrid(np.linspace(-1, 1, 25), np.linspace(-1, 1, 25), indexing="ij")
            distance = np.abs(x + 0.3 * y)
            extra = found.computed.copy()
            extra[tuple(np.transpose(coarse(SHAPE)))] = False
            assert distance[extra].mean() < 0.6 * distance.mean()
    assert counts["bowl"] <= 80 < counts["saddle with an edge"]


def test_leave_one_out_errors_are_those_of_fitting_again() -> None:
    """Rippa's formula, which the error estimate uses, against the plain computation."""
    rng = np.random.default_rng(0)
    places = [tuple(map(int, p)) for p in rng.permutation(list(np.ndindex(9, 9)))[:30]]
    surface = np.cos(np.arange(9) / 3)[:, None] + np.sin(np.arange(9) / 4)[None]
    values = np.array([[surface[p]] for p in places])
    from flatbench.landscape import adaptive

    inverse = np.linalg.inv(adaptive._matrix(np.array(places) / 8))
    solution = inverse @ np.concatenate([values, np.zeros((3, 1))])
    for i in range(len(places)):
        rest = [p for j, p in enumerate(places) if j != i]
        predicted, _ = interpolate((9, 9), rest, np.delete(values, i, axis=0))
        direct = values[i, 0] - predicted[(*places[i], 0)]
        assert solution[i, 0] / inverse[i, i] == pytest.approx(direct, rel=1e-6, abs=1e-9)


def test_on_a_line() -> None:
    x = np.linspace(-1, 1, 51)
    surface = np.sqrt(1e-3 + (x - 0.2) ** 2)[:, None]
    found = refine((51,), lambda places: np.array([surface[p] for p in places]), [0], 0.01)
    assert np.abs(found.values - surface).max() <= 0.015 * np.ptp(surface)
    assert found.computed.sum() < 40


def test_a_plane_of_a_model_marks_what_was_computed() -> None:
    given = subject("vit_lora")
    exact = landscape(given, dims=2)
    quick = landscape(given, dims=2, adaptive=True)
    assert exact.frame["computed"].all()
    assert quick.meta["computed"] == quick.frame["computed"].sum() < exact.meta["computed"] / 3
    left, right = exact.frame["value"], quick.frame["value"]
    computed = quick.frame["computed"]
    assert np.abs(left - right).max() <= 0.015 * np.ptp(left)
    assert left[computed].tolist() == pytest.approx(right[computed].tolist(), rel=1e-9)
    assert (quick.frame["error"][computed] == 0).all()
    assert (quick.frame["error"][~computed] > 0).all()
    assert 0 < quick.meta["error_estimate"] <= 0.01
    assert quick.loss == quick.values().set_index(["x", "y"])["value"][0.0, 0.0]
    assert "interpolated" in quick.describe()["Points"]


def test_nothing_is_interpolated_beside_values_that_are_not_finite() -> None:
    found = landscape(known([9.0, 5, 3, 2, 1, 0.5]).subject, dims=2, points=9, distance=1e200, adaptive=True)
    assert found.frame["computed"].all()
