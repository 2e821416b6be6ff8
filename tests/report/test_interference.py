"""What perturbations do to the merged weights, in the report: the numbers of the runs, averaged and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatbench.report.analysis.results import Results
from flatbench.report.document import all_tables
from flatbench.report.figures import all as figures
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure
from flatbench.report.tables.averages import Table
from flatbench.report.text.explanations import explanations
from tests.report.synthetic import plain, results

MEASURES = ("sam_sharpness_merged", "interference")


def table(data: Results) -> Table | None:
    return next((t for t in all_tables(data) if t.name == "interference"), None)


def drawn(data: Results) -> dict[str, Figure]:
    with style.styled():
        return {f.name: f for f in figures.all_figures(data) if f.name.startswith("interference")}


def sharpness(method: str, seed: int) -> float:
    return float(plain(method, "", seed, {"lr": 0.01})["sharpness"])


def test_the_table_averages_over_training_then_over_seeds(tmp_path: Path) -> None:
    data = results(tmp_path, measures=MEASURES)
    found = table(data)
    assert found is not None
    rows = found.data.set_index(["method", "perturbation"])
    for method in ("lora", "sam"):
        shares = [2 * sharpness(method, s) for s in (0, 1, 2)]  # epochs 1, 2, 3
        assert rows.loc[(method, "sam"), "share_mean"] == pytest.approx(np.mean(shares))
        assert rows.loc[(method, "sam"), "share_std"] == pytest.approx(np.std(shares, ddof=1))
        assert rows.loc[(method, "sam"), "part_mean"] == pytest.approx(0.25)
        # zero in the first epoch: in the norm's mean, in no mean of directions
        cross = [sharpness(method, s) for s in (0, 1, 2)]
        assert rows.loc[(method, "sam_cross"), "share_mean"] == pytest.approx(np.mean(cross))
        assert rows.loc[(method, "sam_cross"), "cosine_mean"] == pytest.approx(0.025)
    (part,) = found.parts
    assert part.caption == "interference, ρ = 0.05"
    assert [cell.text for cell in part.shown["Trained by"]] == ["lora"] * 3 + ["sam"] * 3
    assert "norm" in explanations(data)["interference"]


def test_without_a_course_the_trained_models_are_told(tmp_path: Path) -> None:
    whole = results(tmp_path, measures=MEASURES)
    own = [c for c in whole.history.columns if str(c).startswith("interference.")]
    data = replace(whole, history=whole.history.drop(columns=own))
    found = table(data)
    assert found is not None
    rows = found.data.set_index(["method", "perturbation"])
    assert rows.loc[("lora", "sam"), "cosine_mean"] == pytest.approx(0.3)  # of epoch 3
    assert drawn(data) == {}  # no course to draw


def test_a_study_without_the_measure_has_neither(tmp_path: Path) -> None:
    data = results(tmp_path)
    assert table(data) is None
    assert drawn(data) == {}


def test_a_panel_a_method_and_number(tmp_path: Path) -> None:
    (figure,) = drawn(results(tmp_path, measures=MEASURES)).values()
    axes = figure.figure.axes
    assert len(axes) == 3 * 2
    assert [axis.get_ylabel().replace("\n", " ") for axis in axes[::2]] == [
        "Norm / ρ",
        "Cosine with G",
        "Loss rise at norm ρ",
    ]
    share = axes[0].lines[1]  # after that along G
    mean = np.mean([sharpness("lora", s) for s in (0, 1, 2)])
    assert share.get_xdata().tolist() == [1, 2, 3]
    assert share.get_ydata() == pytest.approx([mean, 2 * mean, 3 * mean])
    assert "lora LoRA-SAM 0.3" in figure.alt


def test_many_methods_and_conditions_are_several_figures(tmp_path: Path) -> None:
    methods = ("lora", "sam", "flat_lora", "eflat_lora", "asam")
    data = results(tmp_path, methods=methods, conditions=("a", "b"), measures=MEASURES)
    found = drawn(data)
    assert sorted(found) == [f"interference_interference_{c}_{page}" for c in "ab" for page in (1, 2)]
    assert len(found["interference_interference_a_2"].figure.axes) == 3


@pytest.mark.parametrize("lost", ["nothing finished", "skipped"])
def test_runs_without_it_are_left_out(tmp_path: Path, lost: str) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        if lost == "skipped":
            return plain(method, condition, seed, choice) | {"skip": {"interference": "no adapter"}}
        return (
            {"state": "failed", "error": "lost"}
            if method == "sam"
            else plain(method, condition, seed, choice)
        )

    data = results(tmp_path, outcomes, measures=MEASURES)
    if lost == "skipped":
        own = [c for c in data.history.columns if str(c).startswith("interference.")]
        data = replace(data, history=data.history.drop(columns=own))
        assert table(data) is None
        return
    found = table(data)
    assert found is not None
    assert set(found.data["method"]) == {"lora"}
