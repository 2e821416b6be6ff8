"""What a report says of time in pairs and of energy, and when it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatbench.report import Comparison, Results
from flatbench.report.analysis.quantities import timing
from flatbench.report.figures.relations import metric_against_cost
from flatbench.report.tables.averages import Table, cost_table, results_table
from flatbench.report.text import answer
from flatbench.report.text.explanations import explanations
from flatbench.report.text.remarks import notes
from flatbench.report.text.statements import statements
from tests.report.synthetic import make, plain
from tests.report.synthetic import results as made

PAIRED = "Time per step relative to LoRA, paired"
ENERGY = "Energy of the training (J)"
RAPL, NVML = "rapl packages, whole machine", "nvml, whole GPUs"


def costs(missing: str | None = None, **values: Any) -> Any:
    """Outcomes with values of the measure cost; the run of ``missing`` with seed 1 has reasons instead."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        own = {"paired_ratio": (1.0 if method == "lora" else 1.9) + 0.01 * seed, **values}
        if method == missing and seed == 1:
            own = {"paired_missing": "memory ran out", "energy_joules": None, "energy_missing": "no counters"}
        return {**plain(method, condition, seed, choice), "cost": own}

    return outcomes


def column(table: Table | None, header: str) -> list[Any]:
    assert table is not None
    return list(table.parts[0].shown[header])


def test_pairs_take_the_place_of_times_taken_apart(tmp_path: Path) -> None:
    data = made(tmp_path, costs())
    assert [cell.plain() for cell in column(results_table(data), PAIRED)] == ["1.01 ± 0.01", "1.91 ± 0.01"]
    assert "Time per step relative to lora" not in results_table(data).parts[0].shown
    both = cost_table(data)
    assert [cell.rank for cell in column(both, PAIRED)] == [1, 2]
    assert column(both, "Time per step relative to lora")
    (figure,) = metric_against_cost(data)
    assert figure.figure.axes[0].get_xlabel().replace("\n", " ") == PAIRED
    assert "in turns" in explanations(data)["cost"]


def test_unless_a_run_lacks_them(tmp_path: Path) -> None:
    data = made(tmp_path, costs(missing="sam"))
    assert PAIRED not in results_table(data).parts[0].shown
    assert PAIRED not in cost_table(data).parts[0].shown  # type: ignore[union-attr]
    assert "sam: 1 of its runs not timed in turns with LoRA: memory ran out." in notes(data)


def test_without_pairs_no_time_is_shown_and_gradients_are(tmp_path: Path) -> None:
    data = made(tmp_path)
    assert "No times are shown: these runs were not timed in turns" in explanations(data)["cost"]
    assert column(results_table(data), "Gradients per step")[1].plain() == "2"
    shown = [*results_table(data).parts[0].shown, *cost_table(data).parts[0].shown]  # type: ignore[union-attr]
    assert not [header for header in shown if "ime" in header or "Energy" in header]
    (figure,) = metric_against_cost(data)
    assert figure.figure.axes[0].get_xlabel().startswith("Matrix products")
    assert not any("paired" in name or "energy" in name for name in cost_table(data).data.columns)  # type: ignore[union-attr]
    assert "paired" not in " ".join(results_table(data).data.columns)


def test_times_of_runs_that_had_their_cores_to_themselves_are_shown(tmp_path: Path) -> None:
    data = made(tmp_path, costs(paired_ratio=None, core_wait_share=0.011, jobs=1))
    assert timing(data) == "alone"
    assert column(results_table(data), "Time per step relative to lora")[1].text == "2.00"
    assert "more than 1.1 % of the time" in explanations(data)["cost"]
    assert not any("Times are not shown" in text for text in answer.reservations(data))
    (cost,) = [s for s in statements(data) if s.kind == "cost"]
    assert cost.details["means"]["sam"] == pytest.approx(2)
    assert "cores of its own" in cost.basis


@pytest.mark.parametrize(
    "values",
    [
        {"core_wait_share": 0.3},  # somebody else was at work
        {"core_wait_share": None},  # nothing recorded it
        {},  # runs of an earlier version
    ],
)
def test_times_of_runs_that_waited_are_not(tmp_path: Path, values: dict[str, Any]) -> None:
    data = made(tmp_path, costs(paired_ratio=None, **values))
    assert timing(data) == ""
    assert "nor are they known to have waited" in explanations(data)["cost"]
    assert column(results_table(data), "Gradients per step")


def test_times_of_two_kinds_of_machine_are_not_compared(tmp_path: Path) -> None:
    data = made(tmp_path, costs(paired_ratio=None, core_wait_share=0.0))
    (one,) = data.environments
    other = replace(data, environments=[one, {**one, "processor": "another"}])
    assert timing(data) == "alone"
    assert timing(other) == ""


@pytest.mark.parametrize(("source", "ranks"), [(RAPL, [0, 0]), (NVML, [1, 1])])
def test_energy_and_whose_it_is(tmp_path: Path, source: str, ranks: list[int]) -> None:
    """A machine's counters hold what others used: no method is better by them."""
    data = made(tmp_path, costs(energy_joules=120.0, energy_source=source, energy_missing=None, jobs=2))
    cells = column(cost_table(data), ENERGY)
    assert [cell.rank for cell in cells] == ranks
    assert cells[0].value == 120
    said = explanations(data)["cost"]
    assert f"({source})" in said
    assert "up to 2 runs of this study at once" in said
    assert "unknown" not in said


def test_energy_that_is_not_known(tmp_path: Path) -> None:
    data = made(tmp_path, costs(energy_joules=None, energy_missing="no counters here"))
    assert ENERGY not in cost_table(data).parts[0].shown  # type: ignore[union-attr]
    assert "Energy is unknown for 6 of 6 runs: no counters here." in explanations(data)["cost"]


def test_energy_of_untimed_runs_is_not_shown(tmp_path: Path) -> None:
    data = made(tmp_path, costs(missing="sam", energy_joules=5.0, energy_source=RAPL, energy_missing=None))
    assert ENERGY not in cost_table(data).parts[0].shown  # type: ignore[union-attr]
    assert "Energy" not in explanations(data)["cost"]


def test_compared_where_both_have_pairs(tmp_path: Path) -> None:
    paired, apart = (Results.load(make(tmp_path / name, o)) for name, o in (("p", costs()), ("a", plain)))
    assert "cost.paired_ratio" in set(Comparison(paired, paired).numbers["quantity"])
    assert "cost.paired_ratio" not in set(Comparison(paired, apart).numbers["quantity"])
