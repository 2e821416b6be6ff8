"""Grids of which a part diverged, and measures that were taken with other options, compare nothing unlike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatbench import store
from flatbench.config.hyper_parameters import hyper_text
from flatbench.report.analysis.differences import differences
from flatbench.report.text.answer import answer
from flatbench.store import RunDirectory, tables
from tests.report.synthetic import make, plain, results


def _diverges(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """sam is worse than lora at every learning rate, and diverges at the worst one."""
    values = plain(method, condition, seed, choice)
    worst = choice["lr"] == 0.1
    test = 0.8 - 0.2 * worst - 0.05 * (method == "sam") + 0.002 * seed
    if method == "sam" and worst:
        return {"state": "diverged", "error": "the loss is not finite"}
    return {**values, "test": test}


def test_a_configuration_that_diverged_on_every_seed_is_a_part_of_the_grid(tmp_path: Path) -> None:
    """Leaving it out would make a method the better the more of its grid diverges."""
    data = results(tmp_path, _diverges, tuned=False, seeds=range(6))
    found = differences(data)
    tested = found[found["quantity"] == "test"] if len(found) else found
    assert len(tested) == 0 or tested["estimate"].isna().all()
    text = " ".join(answer(data))
    assert "sam is above lora" not in text
    assert "Highest mean test accuracy: sam" not in text


def test_a_configuration_that_lost_seeds_does_not_stand_for_its_method(tmp_path: Path) -> None:
    """Not even with the best mean over those that are left."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        values = plain(method, condition, seed, choice)
        if choice["lr"] == 0.1:
            if seed:
                return {"state": "diverged", "error": "the loss is not finite"}
            return {**values, "validation": 0.99}
        return values

    data = results(tmp_path, outcomes, tuned=False)
    assert "lr 0.1" in set(data.final["configuration"])
    assert "lr 0.1" not in set(data.representatives["configuration"])


def test_without_a_validation_metric_the_loss_chooses(tmp_path: Path) -> None:
    """Metrics of generated texts are known for the test set only."""
    data = results(tmp_path, plain, tuned=False)
    table = data.table.copy()
    table["validation.accuracy"] = float("nan")
    rates = table["hyper.lr"]
    table["validation.loss"] = (rates - rates.max()).abs()
    other = replace(data, table=table)
    assert set(other.representatives["hyper.lr"]) == {rates.max()}


def test_a_measure_with_other_options_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make(tmp_path, plain)
    directory = next(d for place, d in folder.places() if place["stage"] == "final")
    spec = json.loads((directory.path / "run.json").read_text())
    file = directory.path / "measures" / "sam_sharpness_merged.json"
    spec["measures"]["sam_sharpness_merged"]["rho"] = 0.05
    (directory.path / "run.json").write_text(json.dumps(spec))
    stored = json.loads(file.read_text())
    for rho, left_out in ((0.05, False), (0.5, True)):
        stored["config"]["rho"] = rho
        file.write_text(json.dumps(stored))
        row = tables._row(RunDirectory(directory.path))
        assert ("sam_sharpness_merged.sharpness" in row) is not left_out
        assert row.get("sam_sharpness_merged.skipped", "").startswith("taken with rho 0.5") is left_out
    assert store.table(folder) is not None


@pytest.mark.parametrize("pair", [(0.00012345678, 0.0001234568), (1e-3, 1.0000001e-3)])
def test_configurations_that_differ_are_written_differently(pair: tuple[float, float]) -> None:
    assert hyper_text({"lr": pair[0]}) != hyper_text({"lr": pair[1]})
    assert hyper_text({"lr": 0.1 + 0.2}) == "lr 0.3"
