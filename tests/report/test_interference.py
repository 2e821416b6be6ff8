"""What perturbations do to the merged weights, in the report: the numbers of the runs, averaged and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flatbench.report.analysis.results import Results
from flatbench.report.document import all_tables
from flatbench.report.figures import all as figures
from flatbench.report.figures import style
from flatbench.report.figures.panels import Figure
from flatbench.report.tables.averages import Table
from flatbench.report.text.answer import answer, headlines
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


def test_the_answer_says_it(tmp_path: Path) -> None:
    data = results(tmp_path, measures=MEASURES)
    said = answer(data)[-1]
    assert said == (
        "Perturbations in the merged weights: at ρ = 0.05 LoRA-SAM's term in both factors has 50 % of its "
        "norm, and of the loss's rise along the gradient, at equal norm, LoRA-SAM 25 % (cosine 0.2)."
    )
    assert headlines(data)[-1] == (
        "Perturbations",
        "LoRA-SAM's term in both factors: 50 % at ρ = 0.05 of its norm",
    )
    assert len(headlines(data)) == len(answer(data))
    assert not any("erturbations" in text for text in answer(results(tmp_path)))


def test_methods_that_share_a_run(tmp_path: Path) -> None:
    """Two methods of one configuration are one run; each has its rows."""
    whole = results(tmp_path, measures=MEASURES)
    as_other = whole.table[whole.table["method"] == "lora"].assign(method="again")
    budget = {**whole.content["budget"], "again": whole.content["budget"]["lora"]}
    content = {**whole.content, "methods": ["lora", "again", "sam"], "budget": budget}
    curves = whole.history[whole.history["method"] == "lora"].assign(method="again")
    data = replace(
        whole,
        table=pd.concat([whole.table, as_other], ignore_index=True),
        history=pd.concat([whole.history, curves], ignore_index=True),
        content=content,
    )
    found = table(data)
    assert found is not None
    rows = found.data.set_index(["method", "perturbation"])
    kept = ["share_mean", "cosine_std", "part_mean", "rise_n"]
    assert rows.loc["again", kept].equals(rows.loc["lora", kept])


def test_runs_of_before_every_was_set_are_counted(tmp_path: Path) -> None:
    """Their history has no rows; the measure of the trained model is there."""
    whole = results(tmp_path, measures=MEASURES)
    older = whole.representatives.query("method == 'lora'")["run"].iloc[0]
    own = [c for c in whole.history.columns if str(c).startswith("interference.")]
    history = whole.history.copy()
    history.loc[history["run"] == older, own] = None
    found = table(replace(whole, history=history))
    assert found is not None
    rows = found.data.set_index(["method", "perturbation"])
    assert rows.loc[("lora", "sam"), "share_n"] == 3
    assert rows.loc[("lora", "sam"), "cosine_mean"] == pytest.approx((0.3 + 0.2 + 0.2) / 3)


def test_parts_compare_the_same_epochs(tmp_path: Path) -> None:
    """The term in both factors has no rise in the first epoch: G's there is left out beside it."""
    data = results(tmp_path, measures=MEASURES)
    own = [c for c in data.history.columns if str(c) == "interference.full_rise"]
    history = data.history.copy()
    history.loc[history["epoch"] == 1, own] *= 100
    found = table(replace(data, history=history))
    assert found is not None
    rows = found.data.set_index(["method", "perturbation"])
    assert rows.loc[("lora", "sam_cross"), "part_mean"] == pytest.approx(0.1 * 2.5 / 4)
