"""What the tables show, in every format."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from flatbench.report.analysis.results import Results
from flatbench.report.document import all_tables, write_report
from flatbench.report.tables import averages, listings, render
from flatbench.report.tables.averages import Part, Table, cost_table, flatness_table, results_table
from flatbench.report.tables.cells import Cell
from flatbench.report.tables.listings import runs_table, selection_table
from flatbench.report.terminal import Fitted, in_short
from tests.report.synthetic import plain, results


def cells(table: Table, header: str, part: int = 0) -> list[str]:
    return [cell.plain() for cell in table.parts[part].shown[header]]


def ranks(table: Table, header: str) -> list[int]:
    return [cell.rank for cell in table.parts[0].shown[header]]


def test_results_show_what_was_chosen_and_how(tmp_path: Path) -> None:
    data = results(tmp_path)
    table = results_table(data)
    assert cells(table, "Method") == ["lora", "sam"]
    assert cells(table, "Hyper-parameters") == ["lr 0.01", "lr 0.01"]
    assert cells(table, "Configurations tried") == ["3 × 1 tuning seed"] * 2
    tests = [100 * plain("sam", "", seed, {"lr": 0.01})["test"] for seed in (0, 1, 2)]
    mean, std = pd.Series(tests).mean(), pd.Series(tests).std()
    assert cells(table, "Test accuracy (%)")[1] == f"{mean:.1f} ± {std:.1f}"
    assert cells(table, "Gradients per step") == ["1", "2"]
    eigenvalues = cells(table, "Largest Hessian eigenvalue (merged weights)")
    assert eigenvalues[1].endswith("(error ≤ 0.0500 %)")
    expected = {"SAM sharpness (merged weights, rho 0.05)", "Largest Hessian eigenvalue (merged weights)"}
    assert expected <= set(table.parts[0].shown.columns)


def test_the_larger_error_is_shown_and_what_is_not_resolved_is_said(tmp_path: Path) -> None:
    def sampled(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        found = plain(method, condition, seed, choice)
        return {
            **found,
            "sampling_error_1": (0.3 if seed else 0.1) * found["eigenvalue"],
            "resolved": not seed,
        }

    data = results(tmp_path, sampled)
    header = "Largest Hessian eigenvalue (merged weights)"
    assert cells(results_table(data), header)[0].endswith("(error ± 30.0 % by sampling)")
    table = flatness_table(data)
    assert table is not None
    assert (
        cells(table, "Error bound of largest Hessian eigenvalue (merged weights)")
        == ["± 30.0 % by sampling (2 of 3 not resolved: more examples)"] * 2
    )


def test_a_rise_that_rounding_hides_is_no_number_and_not_best(tmp_path: Path) -> None:
    def hidden(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        below = method == "sam" or (method == "flat_lora" and seed == 0)
        rise = 0.0 if below else 0.1
        found = {"sharpness": rise, "rounding_error": 0.002 if seed else 0.004, "below_resolution": below}
        return {**plain(method, condition, seed, choice), **found}

    data = results(tmp_path, hidden, methods=("lora", "sam", "flat_lora"))
    header = "SAM sharpness (merged weights, rho 0.05)"
    for table in (results_table(data), flatness_table(data)):
        assert table is not None
        shown = cells(table, header)
        assert shown[0].startswith("0.1")
        assert shown[1] == "below resolution (≤ 0.004)"
        assert "1 of 3 below resolution" in shown[2]
        assert ranks(table, header)[1:] == [0, 0]
    assert cells(table, f"Error bound of {header}")[0] == "≤ 4.00 % by rounding"


def test_best_is_marked_in_the_right_direction(tmp_path: Path) -> None:
    table = results_table(results(tmp_path, methods=("lora", "sam", "flat_lora")))
    shown = table.parts[0].shown
    for header, best in (("Test accuracy (%)", max), ("SAM sharpness (merged weights, rho 0.05)", min)):
        values = [cell.value for cell in shown[header]]
        assert ranks(table, header).index(1) == values.index(best(values))
        assert sorted(ranks(table, header)) == [0, 1, 2]
    assert ranks(table, "Validation accuracy (%)") == [0, 0, 0]


def test_a_method_with_a_lost_run_is_not_best(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        if method == "sam" and seed == 0:
            return {"state": "diverged", "error": "DivergedError: nan"}
        return {
            **plain(method, condition, seed, choice),
            "test": 0.9 if method == "sam" else 0.5 + seed / 100,
        }

    table = results_table(results(tmp_path, outcomes, methods=("lora", "sam", "flat_lora")))
    assert cells(table, "Final runs") == ["3", "2 of 3 (1 diverged)", "3"]
    assert cells(table, "Test accuracy (%)")[1] == "90.0 ± 0.0 (n = 2)"
    assert ranks(table, "Test accuracy (%)")[1] == 0


def test_nothing_is_best_among_configurations_that_nobody_chose(tmp_path: Path) -> None:
    table = results_table(results(tmp_path, tuned=False))
    assert len(table.parts[0].shown) == 6
    assert set(ranks(table, "Test accuracy (%)")) == {0}
    assert set(cells(table, "Configurations tried")) == {"not tuned"}


def test_thousands_of_rows_are_in_the_csv_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = results(tmp_path, tuned=False)
    whole = runs_table(data)
    for module in (averages, listings):
        monkeypatch.setattr(module, "MOST_ROWS", 17)
    table = runs_table(data)
    assert (table.rows, table.readable, list(table.parts)) == (18, False, [])
    assert render.to_csv(table) == render.to_csv(whole)
    files = write_report(data, tmp_path / "report", html=True).files
    assert {name for name in files if name.startswith("runs.")} == {"runs.csv"}
    text = (tmp_path / "report" / "index.html").read_text("utf-8")
    assert "18 rows" in text
    assert f">{whole.data['run'][0]}<" not in text


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    table = results_table(results(tmp_path, seeds=(0,)))
    assert all(text.endswith("(one run)") and "±" not in text for text in cells(table, "Test accuracy (%)"))


def test_conditions_may_have_different_metrics(tmp_path: Path) -> None:
    data = results(tmp_path, conditions=("task=cola", "task=rte"))
    data.table.loc[data.table["condition"] == "task=cola", "metric"] = "matthews"
    data.table["test.matthews"] = data.table["test.accuracy"]
    table = results_table(data)
    assert "Test Matthews correlation (× 100)" in table.parts[0].shown
    assert "Test accuracy (%)" in table.parts[1].shown


def test_absent_measures_make_no_columns(tmp_path: Path) -> None:
    data = results(tmp_path, measures=())
    assert cost_table(data) is None
    assert flatness_table(data) is None
    assert not any("Hessian" in header or "Time" in header for header in results_table(data).parts[0].shown)


def test_merged_weights_come_first_and_every_space_is_shown(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = plain(method, condition, seed, choice)
        return {**found, "skip": {"hessian_adapter": "no adapter"}} if method == "full_ft" else found

    measures = ("hessian_adapter", "hessian_merged", "cost")
    data = results(tmp_path, outcomes, methods=("lora", "full_ft"), measures=measures)
    main = [header for header in results_table(data).parts[0].shown if "Hessian" in header]
    assert main == ["Largest Hessian eigenvalue (merged weights)"]
    flatness = flatness_table(data)
    assert flatness is not None
    assert cells(flatness, "Largest Hessian eigenvalue (adapter A, B)")[1] == "–"
    assert cells(flatness, "Error bound of largest Hessian eigenvalue (merged weights)")[0] == "≤ 0.0500 %"


def test_peak_memory_of_a_process_is_not_ranked(tmp_path: Path) -> None:
    table = cost_table(results(tmp_path))
    assert table is not None
    cells_of = table.parts[0].shown["Peak resident memory of the process (MB)"]
    assert all(cell.rank == 0 for cell in cells_of)


def test_selection_tells_a_tie(tmp_path: Path) -> None:
    """Of equal scores the grid's first is taken: another order would give another choice."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return {
            **plain(method, condition, seed, choice),
            "validation": 0.5 if method == "sam" else choice["lr"],
        }

    data = results(tmp_path, outcomes)
    table = selection_table(data)
    assert table is not None
    (chosen,) = [
        cell
        for cell, method in zip(cells(table, "Chosen"), cells(table, "Method"), strict=True)
        if cell and method == "sam"
    ]
    assert chosen.startswith("chosen (first of 3 that tied")
    write_report(data, tmp_path / "report")
    text = " ".join((tmp_path / "report" / "README.md").read_text(encoding="utf-8").split())
    assert "several configurations of sam had the best score: the grid's first was taken" in text


@pytest.mark.parametrize("certified", [True, False, None])
def test_what_error_bounds_say_is_what_was_proved(tmp_path: Path, certified: bool | None) -> None:
    data = results(tmp_path)
    if certified is not None:
        data.table["hessian_merged.certified"] = True
        data.final["hessian_merged.certified"] = [certified, *[True] * (len(data.final) - 1)]
    write_report(data, tmp_path / "report")
    text = " ".join((tmp_path / "report" / "README.md").read_text(encoding="utf-8").split())
    assert ("with a probability of 99 % a run" in text) == bool(certified)
    assert ("Some eigenvalue lies within" in text) == (not certified)


def test_selection_tells_the_edge(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = plain(method, condition, seed, choice)
        return {**found, "validation": choice["lr"]} if method == "sam" else found

    table = selection_table(results(tmp_path, outcomes))
    assert table is not None
    chosen = cells(table, "Chosen")
    assert chosen == ["", "chosen", "", "", "", "chosen (edge of the grid: largest lr)"]
    assert cells(table, "Validation accuracy (%)")[-1] == "10.00"


def test_runs_are_all_listed(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        lost = {"state": "failed", "error": "ValueError: a | <script>\nsecond line"}
        return lost if (method, seed) == ("sam", 1) else plain(method, condition, seed, choice)

    data = results(tmp_path, outcomes)
    table = runs_table(data)
    assert len(table.data) == len(data.table) == 12
    assert cells(table, "State").count("failed") == 1
    assert "ValueError: a | <script> second line" in cells(table, "Error")
    text = render.to_markdown(table)
    assert "<script>" not in text
    assert len(text.strip().splitlines()) == 12 + 2


def test_csv_holds_twelve_digits(tmp_path: Path) -> None:
    table = results_table(results(tmp_path))
    back = pd.read_csv(io.StringIO(render.to_csv(table)), keep_default_na=False)
    assert list(back["test_mean"].astype(float)) == list(table.data["test_mean"])
    exact = results(tmp_path / "again").final.groupby("method", sort=False)["test"].mean()
    assert list(table.data["test_mean"]) == pytest.approx(list(exact), rel=1e-11)


def test_latex_is_booktabs(tmp_path: Path) -> None:
    text = render.to_latex(results_table(results(tmp_path, conditions=("a_b%", "c&d"))))
    for needed in (
        r"\toprule",
        r"\midrule",
        r"\bottomrule",
        r"a\_b\%",
        r"c\&d",
        r"{\small $\pm$",
        r"\textbf{",
    ):
        assert needed in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2


@pytest.mark.parametrize("width", [60, 80, 200])
def test_terminal_table(tmp_path: Path, width: int) -> None:
    data: Results = results(tmp_path, name="demo")
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(in_short(data))
    text = console.export_text()
    for needed in ("lora", "sam", "lr 0.01", "Before you rely on it:"):
        assert needed in text
    assert text.index("Highest mean test accuracy") < text.index("Method")  # the answer comes first
    assert max(map(len, text.splitlines())) <= width
    assert "every method tried 3 configurations × 1 tuning seed" in " ".join(text.split())


@pytest.mark.parametrize("width", [40, 80])
def test_no_name_and_no_number_is_cut_in_a_terminal(width: int) -> None:
    names = ["a_method_with_a_long_name", "flat_lora_rwp", "lora"]
    columns = {"Method": [Cell(name) for name in names]}
    columns |= {f"A quantity of number {i} (ms)": [Cell("12.34", "0.56", value=12.34)] * 3 for i in range(7)}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(Fitted(Part("a study", pd.DataFrame(columns))))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    pieces = text.count("Method")
    assert pieces > 1
    for name in names:
        assert len(re.findall(rf"\b{name}\b", text)) == pieces  # every piece says what its rows are
    assert text.count("12.34 ± 0.56") == 21
    assert text.count("quantity") == 7


@pytest.mark.slow
def test_all_tables_of_several_conditions(tmp_path: Path) -> None:
    data = results(tmp_path, methods=("lora", "sam", "flat_lora"), conditions=("noise=0.0", "noise=0.2"))
    tables = {table.name: table for table in all_tables(data)}
    assert set(tables) == {
        "methods",
        "results",
        "overview",
        "comparisons",
        "aggregates",
        "flatness",
        "correlations",
        "cost",
        "measures",
        "selection",
        "runs",
    }
    header = "noise=0.2: test accuracy (%)"
    assert cells(tables["overview"], header) == cells(tables["results"], "Test accuracy (%)", part=1)
    measured = tables["measures"].data.query(
        "condition == 'noise=0.0' and method == 'sam' and quantity == 'mean_rise'"
    )
    expected = [5.5 * plain("sam", "noise=0.0", s, {"lr": 0.01})["sharpness"] for s in (0, 1, 2)]
    assert measured["mean"].item() == pytest.approx(sum(expected) / 3)


def test_the_best_is_that_of_the_headline(tmp_path: Path) -> None:
    """Ratios are compared by geometric means: a method with one outlier may have the lowest of these."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        value = {"lora": 3.0, "sam": 100.0 if seed == 0 else 0.1}.get(method, 5.0)
        return {**plain(method, condition, seed, choice), "eigenvalue": value}

    data = results(tmp_path, outcomes)
    table = results_table(data)
    (header,) = [h for h in table.parts[0].shown if "eigenvalue" in h]
    best = [
        method.text
        for method, cell in zip(table.parts[0].shown["Method"], table.parts[0].shown[header], strict=True)
        if cell.rank == 1
    ]
    assert best == ["sam"]
    write_report(data, tmp_path / "report")
    text = " ".join((tmp_path / "report" / "README.md").read_text(encoding="utf-8").split())
    assert "Lowest mean largest Hessian eigenvalue (merged weights): sam (geometric mean" in text


def test_methods_with_equal_means_are_all_named(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        return {**plain(method, condition, seed, choice), "test": 0.5 + 0.01 * seed}

    write_report(results(tmp_path, outcomes), tmp_path / "report")
    text = " ".join((tmp_path / "report" / "README.md").read_text(encoding="utf-8").split())
    assert "Highest mean test accuracy: lora and sam (" in text
