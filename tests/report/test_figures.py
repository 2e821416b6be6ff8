"""Figures show the numbers that were stored, each method in its own look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flatbench.report.analysis.differences import differences
from flatbench.report.analysis.results import Results
from flatbench.report.figures import all as figures
from flatbench.report.figures import relations, style
from flatbench.report.figures.panels import Figure
from flatbench.report.figures.relations import pareto_front
from tests.report.synthetic import plain, results


def drawn(data: Results) -> dict[str, Figure]:
    with style.styled():
        return {figure.name: figure for figure in figures.all_figures(data)}


def test_every_figure_names_its_axes_and_units(tmp_path: Path) -> None:
    made = drawn(results(tmp_path))
    assert set(made) == {
        "differences",
        "differences_column",
        "metric_vs_sam_sharpness_merged_sharpness",
        "metric_vs_hessian_merged_eigenvalue_1",
        "metric_vs_slice_merged_mean_rise",
        "metric_vs_cost",
        "sensitivity_lr",
        "training_loss",
        "validation_metric",
        "slices_slice_merged",
        "over_training_sam_sharpness_merged_sharpness",
    }
    for name, figure in made.items():
        if name.startswith("differences"):
            continue
        (axis,) = figure.figure.axes
        assert axis.get_xlabel()
        assert axis.get_ylabel()
        assert figure.alt.endswith(".")
        assert figure.figure.get_figwidth() == style.COLUMN
    assert made["metric_vs_cost"].figure.axes[0].get_ylabel() == "Test accuracy (%)"


@pytest.mark.drawn
def test_thousands_of_points_are_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture a method took 100 MB of memory; lines are above the points and stay lines."""
    monkeypatch.setattr(relations, "_MANY", 1)
    figure = drawn(results(tmp_path, tuned=False))["metric_vs_sam_sharpness_merged_sharpness"]
    style.save(figure.figure, tmp_path, "many")
    assert len(figure.figure.axes[0].lines) == 4  # of each method its line and its points
    assert (tmp_path / "many.svg").read_text("utf-8").count("<image") == 1


def test_courses_and_spectra(tmp_path: Path) -> None:
    measures = (
        "sam_sharpness_merged",
        "balancedness",
        "spectrum_merged",
        "hessian_merged",
        "cost",
        "ema_gap",
    )
    made = drawn(results(tmp_path, measures=measures))
    (axis,) = made["over_training_sam_sharpness_merged_sharpness"].figure.axes
    sharp = np.mean([plain("lora", "", s, {"lr": 0.01})["sharpness"] for s in (0, 1, 2)])
    assert axis.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axis.lines[0].get_ydata() == pytest.approx([3 * sharp, 2 * sharp, sharp])
    assert axis.get_yscale() == "log"
    (axis,) = made["over_training_balancedness_balancedness"].figure.axes
    assert axis.lines[0].get_ydata() == pytest.approx([-sharp, -2 * sharp, -3 * sharp])
    assert axis.get_yscale() == "linear"
    (axis,) = made["over_training_balancedness_by_layer"].figure.axes
    assert len(axis.lines) == 4  # two layers of two methods
    assert axis.lines[0].get_ydata() == pytest.approx([-sharp - 1, -2 * sharp - 1, -3 * sharp - 1])
    assert axis.lines[1].get_ydata() == pytest.approx([-sharp + 1, -2 * sharp + 1, -3 * sharp + 1])
    (axis,) = made["over_training_ema_gap_gap"].figure.axes  # which no finished run has
    assert axis.lines[0].get_ydata() == pytest.approx([sharp, sharp / 2, sharp / 3])
    (axis,) = made["spectrum_spectrum_merged"].figure.axes
    top = plain("lora", "", 0, {"lr": 0.01})["eigenvalue"]  # of one seed, not averaged
    assert axis.lines[0].get_xdata() == pytest.approx([-0.1 * top, 0, 0.5 * top, top])
    assert axis.lines[0].get_ydata().tolist() == [0.1, 0.8, 0.01, 0.02]
    assert "metric_vs_spectrum_merged_trace" in made


def test_points_are_the_runs(tmp_path: Path) -> None:
    (axis,) = drawn(results(tmp_path))["metric_vs_sam_sharpness_merged_sharpness"].figure.axes
    small = {
        round(x, 9): y for line in axis.lines if len(line.get_xdata()) == 3 for x, y in line.get_xydata()
    }
    runs = [plain(m, "", s, {"lr": 0.01}) for m in ("lora", "sam") for s in (0, 1, 2)]
    assert len(small) == 6
    for run in runs:
        assert small[round(run["sharpness"], 9)] == pytest.approx(100 * run["test"])


def test_slices_show_how_the_loss_rises_from_each_runs_own(tmp_path: Path) -> None:
    """Runs that ended at different losses: what is compared is the rise, and it begins at 0."""
    data = results(tmp_path)
    moved = data.slices.assign(loss=data.slices["loss"] + data.slices["seed"])
    (axis,) = drawn(replace(data, slices=moved))["slices_slice_merged"].figure.axes
    (same,) = drawn(data)["slices_slice_merged"].figure.axes
    for line, other in zip(axis.lines, same.lines, strict=True):
        assert line.get_ydata() == pytest.approx(other.get_ydata())
        assert line.get_ydata()[2] == pytest.approx(0)


def test_a_figure_says_which_methods_and_conditions_it_lacks(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        if (method, condition) == ("sam", "task.label_noise=0.2"):
            return {"state": "failed", "error": "lost"}
        return None if condition == "x=1" else plain(method, condition, seed, choice)

    conditions = ("task.label_noise=0.0", "task.label_noise=0.2", "x=1")
    made = drawn(results(tmp_path, outcomes, methods=("lora", "sam"), conditions=conditions))
    figure = made["metric_vs_sam_sharpness_merged_sharpness"]
    assert figure.caption.endswith("Not shown, for want of numbers: x=1.")
    titles = [axis.get_title() for axis in figure.figure.axes if axis.get_title()]
    assert titles == ["0 % wrong labels", "20 % wrong labels"]


@pytest.mark.slow
def test_curves_of_whole_grids_say_whose_they_are(tmp_path: Path) -> None:
    made = drawn(results(tmp_path, tuned=False, conditions=("a", "b")))
    assert "best mean validation metric" in made["training_loss"].caption
    # of a study that chose nothing no runs stand for a method: they would be chosen by what they are
    # compared in
    assert "performance_profile" not in made


def test_two_values_are_no_course(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return (
            {"state": "failed", "error": "x"}
            if choice["lr"] == 0.1
            else plain(method, condition, seed, choice)
        )

    assert "sensitivity_lr" not in drawn(results(tmp_path, outcomes))


def test_slices_average_directions_and_seeds(tmp_path: Path) -> None:
    (axis,) = drawn(results(tmp_path))["slices_slice_merged"].figure.axes
    line = axis.lines[0]
    sharp = np.mean([plain("lora", "", s, {"lr": 0.01})["sharpness"] for s in (0, 1, 2)])
    assert line.get_xdata() == pytest.approx([-1, -0.5, 0, 0.5, 1])
    assert line.get_ydata() == pytest.approx([5.5 * sharp * t * t for t in (-1, -0.5, 0, 0.5, 1)])


def test_curves_average_the_epoch_and_end_with_the_final_validation(tmp_path: Path) -> None:
    made = drawn(results(tmp_path))
    loss = made["training_loss"].figure.axes[0].lines[0]
    assert loss.get_ydata() == pytest.approx([2.15, 1.15, 2 / 3 + 0.15])
    metric = made["validation_metric"].figure.axes[0].lines[0]
    assert list(metric.get_xdata()) == [1, 2, 3]
    end = np.mean([plain("lora", "", s, {"lr": 0.01})["validation"] for s in (0, 1, 2)])
    assert metric.get_ydata() == pytest.approx([20, 40, 100 * end])


def test_methods_differ_without_colour() -> None:
    names = [f"method_{i}" for i in range(20)]
    looks = style.looks(names)
    assert len({(look.marker, str(look.line)) for look in looks.values()}) == 20
    first = [looks[name] for name in names[:14]]
    assert len({look.colour for look in first}) == len({look.marker for look in first}) == 14
    assert style.looks(names[:3])["method_2"] == looks["method_2"]


def test_a_wide_range_is_logarithmic_with_plain_numbers(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return {**plain(method, condition, seed, choice), "eigenvalue": 10.0 ** (seed + 1)}

    figure = drawn(results(tmp_path, outcomes))["metric_vs_hessian_merged_eigenvalue_1"].figure
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    figure.draw_without_rendering()
    labels = [tick.get_text() for tick in axis.get_xticklabels() if tick.get_text()]
    assert {"10", "100", "1000"} <= set(labels)


def test_values_carry_the_larger_of_their_errors(tmp_path: Path) -> None:
    """Of the sample and of the search: a line a point, and the caption says how much it is."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        found = plain(method, condition, seed, choice)
        return {**found, "sampling_error_1": (0.4 if seed else 0.2) * found["eigenvalue"]}

    made = drawn(results(tmp_path, outcomes))
    figure = made["metric_vs_hessian_merged_eigenvalue_1"]
    assert "uncertain by more than 40 %, by the larger of their errors (thin lines)." in figure.caption
    (axis,) = figure.figure.axes
    segments = [part for lines in axis.collections for part in lines.get_segments()]
    final = results(tmp_path, outcomes).final
    values = final["hessian_merged.eigenvalue_1"]
    assert len(segments) == len(final)
    wide = sorted(float(part[1][0] - part[0][0]) for part in segments)
    shares = [0.4 if seed else 0.2 for seed in final["seed"]]
    assert wide == pytest.approx(sorted(2 * share * v for share, v in zip(shares, values, strict=True)))
    assert "uncertain" not in made["metric_vs_sam_sharpness_merged_sharpness"].caption
    assert not made["metric_vs_sam_sharpness_merged_sharpness"].figure.axes[0].collections


@pytest.mark.slow
def test_many_conditions_go_on_pages(tmp_path: Path) -> None:
    data = results(tmp_path, conditions=[f"n={i}" for i in range(14)], measures=("cost",))
    made = drawn(data)
    assert {"metric_vs_cost_1", "metric_vs_cost_2"} <= set(made)
    assert len([a for a in made["metric_vs_cost_1"].figure.axes if a.get_title()]) == 12
    assert [a.get_title() for a in made["metric_vs_cost_2"].figure.axes if a.get_title()] == ["n=12", "n=13"]


def test_pareto_front_against_its_definition() -> None:
    generator = np.random.default_rng(0)
    cost = pd.Series(generator.integers(0, 6, 40).astype(float))
    gain = pd.Series(generator.integers(0, 6, 40).astype(float))
    front = set(pareto_front(cost, gain))
    for i in range(40):
        beaten = any(
            cost[j] <= cost[i] and gain[j] >= gain[i] and (cost[j], gain[j]) != (cost[i], gain[i])
            for j in range(40)
        )
        assert (i in front) != beaten


def test_sensitivity_shows_the_best_score_of_each_value(tmp_path: Path) -> None:
    (axis,) = drawn(results(tmp_path))["sensitivity_lr"].figure.axes
    line = axis.lines[1]
    assert line.get_xdata() == pytest.approx([0.001, 0.01, 0.1])
    expected = [100 * plain("sam", "", 100, {"lr": lr})["validation"] for lr in (0.001, 0.01, 0.1)]
    assert line.get_ydata() == pytest.approx(expected)


@pytest.mark.slow
def test_profile_starts_at_all_runs_and_falls(tmp_path: Path) -> None:
    data = results(tmp_path, conditions=("a", "b"))
    (axis,) = drawn(data)["performance_profile"].figure.axes
    for line in axis.lines:
        shares = line.get_ydata()
        assert (np.diff(shares) <= 0).all()
        assert 0 <= shares[-1] <= shares[0] <= 1


def test_lines_are_within_methods_and_none_goes_over_all(tmp_path: Path) -> None:
    """Each method falls, and all together rise (Simpson): no line may rise."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        place, moved = int(method[1:]), choice["lr"] * 10
        found = plain(method, condition, seed, choice)
        return {**found, "sharpness": 10 + 3 * place + moved, "test": 0.5 + 0.02 * place - 0.01 * moved}

    methods = [f"m{i}" for i in range(4)]
    (axis,) = drawn(results(tmp_path, outcomes, methods=methods, tuned=False))[
        "metric_vs_sam_sharpness_merged_sharpness"
    ].figure.axes
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
    assert len(lines) == 4
    for line in lines:
        assert np.diff(line.get_ydata()) == pytest.approx(-np.diff(line.get_xdata()))


def test_the_first_figure_shows_differences_with_their_intervals(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = plain(method, condition, seed, choice)
        return {**found, "test": found["test"] + 0.001 * len(method) * (seed % 2)}

    data = results(tmp_path, outcomes, methods=("lora", "sam", "flat_lora"))
    made = drawn(data)
    assert next(iter(made)) == "differences"
    axes = made["differences"].figure.axes
    assert "Test accuracy (points) minus lora" in axes[0].get_xlabel().replace("\n", " ")
    frame = differences(data)
    row = frame[(frame["quantity"] == "test") & (frame["method"] == "sam")].iloc[0]
    ends = [tuple(line.get_xdata()) for line in axes[0].lines if len(line.get_xdata()) == 2]
    assert any(e == pytest.approx((100 * row["low"], 100 * row["high"])) for e in ends)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["flat_lora", "sam"]


def test_no_final_runs_no_figures(tmp_path: Path) -> None:
    assert drawn(results(tmp_path, lambda *_: None)) == {}
