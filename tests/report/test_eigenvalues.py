"""Eigenvalues in reports: named by matrix and end of the spectrum, and ranked where lower is flatter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flatbench.report.document import write_report
from flatbench.report.tables.averages import results_table
from tests.report.synthetic import plain, results


def test_an_eigenvalue_by_magnitude_is_named_so_and_not_ranked(tmp_path: Path) -> None:
    """The largest in magnitude may be negative, and is no less sharp for that."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return {**plain(method, condition, seed, choice), "which": "LM", "eigenvalue": -5.0}

    shown = results_table(results(tmp_path, outcomes)).parts[0].shown
    header = "Hessian eigenvalue of largest magnitude (merged weights)"
    assert header in shown
    assert all(cell.rank == 0 for cell in shown[header])


@pytest.mark.parametrize(
    ("measured", "name", "ranked"),
    [
        ({"which": "SA", "eigenvalue": -0.005}, "Smallest Hessian eigenvalue", False),
        ({"which": "LM", "matrix": "hessian"}, "Hessian eigenvalue of largest magnitude", False),
        ({"which": "LA", "matrix": "gauss_newton"}, "Largest Gauss-Newton eigenvalue", True),
        ({"which": "LM", "matrix": "gauss_newton"}, "Largest Gauss-Newton eigenvalue", True),
        ({"which": "SA", "matrix": "gauss_newton"}, "Smallest Gauss-Newton eigenvalue", False),
    ],
)
def test_an_eigenvalue_is_named_by_its_matrix_and_its_end(
    tmp_path: Path, measured: Mapping[str, Any], name: str, ranked: bool
) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return {**plain(method, condition, seed, choice), **measured}

    data = results(tmp_path, outcomes)
    shown = results_table(data).parts[0].shown
    (header,) = [h for h in shown if "eigenvalue" in h]
    assert header == f"{name} (merged weights)"
    assert any(cell.rank for cell in shown[header]) == ranked
    write_report(data, tmp_path / "report")
    text = (tmp_path / "report" / "README.md").read_text(encoding="utf-8")
    assert "Largest Hessian" not in text
    assert "largest Hessian" not in text


def test_runs_that_measured_different_eigenvalues_are_in_no_column_of_one_kind(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return {**plain(method, condition, seed, choice), "which": "SA" if method == "sam" else "LA"}

    shown = results_table(results(tmp_path, outcomes)).parts[0].shown
    (header,) = [h for h in shown if "igenvalue" in h]
    assert header == "Eigenvalue, not of one kind (merged weights)"
    assert all(cell.rank == 0 for cell in shown[header])


def test_the_hessian_is_what_the_main_table_shows_beside_another_matrix(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return plain(method, condition, seed, choice)

    measures = ("hessian_adapter", "hessian_merged")
    data = results(tmp_path, outcomes, measures=measures)
    data.table["hessian_merged.matrix"] = "gauss_newton"
    data.table["hessian_adapter.matrix"] = "hessian"
    (header,) = [h for h in results_table(data).parts[0].shown if "eigenvalue" in h]
    assert header == "Largest Hessian eigenvalue (adapter A, B)"
