"""Two results side by side: what changed is found, what did not is not claimed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from flatbench import cli
from flatbench.report import Comparison, Results, write_report
from tests.report.synthetic import make, plain


def better(by: float) -> Any:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = plain(method, condition, seed, choice)
        # a gain that differs a little from seed to seed
        return found | {"test": found["test"] + (by + 0.0001 * seed if method == "sam" else 0.0)}

    return outcomes


def both(tmp_path: Path, *pairs: tuple[Any, dict[str, Any]]) -> Comparison:
    made = [Results.load(make(tmp_path / str(i), o, **options)) for i, (o, options) in enumerate(pairs)]
    return Comparison(*made)


def test_equal_results_differ_in_nothing(tmp_path: Path) -> None:
    found = both(tmp_path, (plain, {}), (plain, {}))
    assert found.settings.empty
    assert (found.numbers["difference"] == 0).all()
    assert found.remarks == [
        "Nothing is told apart: each of the 8 intervals, simultaneous over 8 differences, holds zero.",
        "6 runs are in both; 6 of them have equal metrics to the bit.",
    ]


def test_paired_differences(tmp_path: Path) -> None:
    found = both(tmp_path, (plain, {}), (better(0.05), {}))
    row = found.numbers[(found.numbers["method"] == "sam") & (found.numbers["quantity"] == "test")].iloc[0]
    differences = [0.05 + 0.0001 * s for s in (0, 1, 2)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / 8)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert row["difference"] == pytest.approx(mean(differences))
    claims = [text for text in found.remarks if " in B, by " in text]
    assert claims[0].startswith("sam: test accuracy is higher in B, by +5.0 points [+4.9, +5.1]")
    assert found.remarks[: len(claims)] == claims  # what differs comes first
    assert not any(c.startswith("lora") for c in claims)
    assert "6 runs are in both; 3 of them have equal metrics to the bit" in " ".join(found.remarks)


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    found = both(tmp_path, (plain, {}), (better(0.05), {"seeds": (10, 11, 12, 13)}))
    row = found.numbers[(found.numbers["method"] == "sam") & (found.numbers["quantity"] == "test")].iloc[0]
    ours, theirs = (
        np.array([o("sam", "", s, {"lr": 0.01})["test"] for s in seeds])
        for o, seeds in ((plain, (0, 1, 2)), (better(0.05), (10, 11, 12, 13)))
    )
    expected = stats.ttest_ind(theirs, ours, equal_var=False)
    limits = expected.confidence_interval(1 - 0.05 / 8)
    assert (row["low"], row["high"], row["p"]) == pytest.approx(
        (limits.low, limits.high, min(1, 8 * expected.pvalue))
    )
    assert row["interval"] == "Welch's t, simultaneous over 8"


def test_what_stands_in_one_alone_and_single_runs(tmp_path: Path) -> None:
    found = both(
        tmp_path,
        (plain, {"methods": ("lora", "sam")}),
        (plain, {"methods": ("lora", "asam"), "seeds": (5,), "name": "other"}),
    )
    assert "Methods in A alone: sam." in found.remarks
    assert "Methods in B alone: asam." in found.remarks
    assert set(found.numbers["method"]) == {"lora"}
    assert found.numbers["low"].isna().all()
    assert "4 differences have no interval (too few runs)." in found.remarks


def test_nothing_in_common(tmp_path: Path) -> None:
    found = both(tmp_path, (plain, {"conditions": ("a=1",)}), (plain, {"conditions": ("a=2",)}))
    assert found.numbers.empty
    assert "Conditions in A alone: a=1." in found.remarks
    assert found.remarks[0].startswith("There is nothing to compare")


def test_settings_and_versions(tmp_path: Path) -> None:
    second = make(tmp_path / "b", tuned=False)
    for run in second.directories():
        environment = run.environment() or {}
        run.write("environment", {**environment, "versions": {"python": "3.11", "torch": "2.14"}})
    found = Comparison(Results.load(make(tmp_path / "a")), Results.load(second))
    changed = {row["setting"]: (row["a"], row["b"]) for row in found.settings.to_dict("records")}
    assert changed["version of torch"] == ("2.13", "2.14")
    assert changed["tune.seeds"] == ("[100]", "–")


@pytest.mark.slow
def test_command_line_from_files_and_folders(tmp_path: Path) -> None:
    write_report(Results.load(make(tmp_path / "a")), tmp_path / "report")
    make(tmp_path / "b", better(0.05), name="later")
    ran = CliRunner().invoke(
        cli.app,
        ["compare", str(tmp_path / "report"), str(tmp_path / "b/later"), "--output", str(tmp_path / "out")],
        env={"COLUMNS": "200"},
    )
    assert ran.exit_code == 0, ran.output
    assert "Test accuracy (%)" in ran.output
    text = (tmp_path / "out/README.md").read_text()
    assert "- A: demo, 6 final runs, commit abc" in text
    assert "sam: test accuracy is higher in B, by +5.0 points" in text
    assert (tmp_path / "out/numbers.csv").is_file()
    assert (tmp_path / "out/settings.tex").is_file() is False  # the studies are set alike
