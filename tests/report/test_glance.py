"""Every method on a line: the numbers are the runs' own, and the words those of the statements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatbench.report.numbers import off_zero
from flatbench.report.tables.glance import methods_table
from flatbench.report.text import answer
from flatbench.report.text.findings import findings
from flatbench.report.text.sentences import sentence
from flatbench.report.text.statements import statements
from tests.report.synthetic import plain, results

CONDITIONS = ("task.label_noise=0.0", "task.label_noise=0.2")


def noisy(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """SAM is ten points better and three times as flat, with a little noise."""
    found = plain(method, condition, seed, choice)
    better = method == "sam"
    wave = 0.001 * ((seed * 7 + len(condition) + better * seed) % 3)
    return {**found, "test": 0.7 + 0.1 * better + wave, "eigenvalue": (100.0 - 66.0 * better) * (1 + wave)}


def test_a_row_a_method_with_its_mean_and_its_difference(tmp_path: Path) -> None:
    data = results(tmp_path, noisy, methods=("lora", "sam"), conditions=CONDITIONS)
    table = methods_table(data)
    assert table is not None
    (part,) = table.parts
    shown = {header: [cell.plain() for cell in part.shown[header]] for header in part.shown}
    assert shown["Method"] == ["lora", "sam"]
    means = data.final.groupby(["method", "condition"])["test"].mean().groupby("method").mean()
    assert list(table.data["test"]) == pytest.approx([means["lora"], means["sam"]])
    assert shown["Test accuracy (%), mean over all conditions"] == [f"{100 * m:.1f}" for m in means]
    (name,) = [h for h in shown if h.startswith("Test accuracy minus")]
    assert name == "Test accuracy minus lora's (points), 95 % interval"
    assert shown[name][0] == "reference"
    assert shown[name][1].startswith("+10.0 [")
    assert shown[name][1].endswith("(differs)")
    (ratio,) = [h for h in shown if h.startswith("Eigenvalue over")]
    assert shown[ratio][1].startswith("× 0.34 [")
    assert shown["Final runs"] == ["6", "6"]


def test_none_where_a_mean_over_tasks_has_no_meaning(tmp_path: Path) -> None:
    data = results(tmp_path, noisy, methods=("lora", "sam"), conditions=("a", "b"))
    mixed = data.table.assign(metric=["mse" if c == "b" else "accuracy" for c in data.table["condition"]])
    mixed["test.mse"] = 0.1
    assert methods_table(replace(data, table=mixed)) is None
    assert methods_table(results(tmp_path / "one", methods=("lora",))) is None


def test_a_headline_a_sentence(tmp_path: Path) -> None:
    data = results(tmp_path, noisy, methods=("lora", "sam"), conditions=CONDITIONS)
    lines = answer.headlines(data)
    assert len(lines) == len(findings(data))
    assert dict(lines)["Generalizes best"].startswith("highest mean sam; sam above lora, +10.0 [")
    assert dict(lines)["Flattest by largest Hessian eigenvalue"].startswith(
        "lowest mean sam; sam flatter than lora, × 0.34 ["
    )
    nothing = answer.headlines(results(tmp_path / "nothing", lambda *_: None))
    assert nothing == [("", findings(results(tmp_path / "again", lambda *_: None))[0])]


def test_conditions_keep_their_names_at_the_start_of_a_sentence(tmp_path: Path) -> None:
    made = statements(results(tmp_path, noisy, methods=("lora", "sam"), conditions=("rte", "mrpc")))
    texts = [sentence(s) for s in made if s.condition == "rte"]
    assert texts
    assert all(text.startswith("rte: ") for text in texts)


def test_what_is_not_zero_is_not_written_as_zero() -> None:
    assert off_zero(-0.0005, 1, sign=True) == "-0.0005"
    assert off_zero(0.012, 1, sign=True) == "+0.01"
    assert off_zero(0.0, 1, sign=True) == "+0.0"
    assert off_zero(-0.06, 1) == "-0.1"
    assert off_zero(12.34, 1, sign=True) == "+12.3"
