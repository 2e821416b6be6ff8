"""Published figures beside ours: matched by task, metric and method, with what was different."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from typer.testing import CliRunner

from flatbench import cli, optim, tasks
from flatbench.config.study_files import predefined, read
from flatbench.errors import InputError
from flatbench.report import Results, load_publications
from flatbench.report.tables.published import published_table
from flatbench.study.methods import METHOD_SHORTHANDS
from tests.report.synthetic import make, plain, results


def test_every_shipped_figure_names_a_task_and_a_method_that_exist() -> None:
    found = load_publications()
    assert {"arXiv 2508.00522", "arXiv 2410.14802 (BAR)"} <= {publication.source for publication in found}
    for publication in found:
        for table in publication.tables:
            for row in table.rows:
                assert row.task["name"] in tasks.REGISTRY
                # an option that the task does not have would match no study, without a word
                assert set(row.task) - {"name"} <= set(tasks.REGISTRY.options(row.task["name"]).model_fields)
                for method, figure in row.values.items():
                    assert method in METHOD_SHORTHANDS or method in optim.REGISTRY
                    assert 0 < figure < 100


def test_rows_are_matched_and_differences_are_named(tmp_path: Path) -> None:
    data = results(tmp_path, conditions=("rte", "cola"), methods=("lora", "nbar", "own"))
    table = published_table(data, load_publications())
    assert table is not None
    # the synthetic metric is accuracy, so CoLA's Matthews correlation has no counterpart
    assert set(table.data["condition"]) == {"rte"}
    assert set(table.data["method"]) == {"lora", "nbar"}
    row = table.data[(table.data["method"] == "nbar")].iloc[0]
    ours = 100 * mean(plain("nbar", "rte", s, {"lr": 0.01})["test"] for s in (0, 1, 2))
    assert row["published"] == 89.2
    assert row["mean"] == pytest.approx(ours)
    assert row["difference"] == pytest.approx(ours - 89.2)
    assert "model RoBERTa-large (here small)" in row["setup"]
    assert "training examples all (here 320)" in row["setup"]
    assert row["setup"].endswith("seeds 3")  # the same here: not named twice
    shown = table.parts[0].shown
    assert list(shown["Here − published"].map(lambda cell: cell.text)) == [
        f"{d:+.1f}" for d in table.data["difference"]
    ]


@pytest.mark.slow
def test_an_average_needs_exactly_its_tasks(tmp_path: Path) -> None:
    five = ("mnli", "sst2", "cola", "qnli", "mrpc")
    data = results(tmp_path / "a", conditions=five)
    rows = published_table(data, load_publications())
    assert rows is not None
    (row,) = rows.data[
        (rows.data["condition"] == "all conditions") & (rows.data["method"] == "lora")
    ].to_dict("records")
    means = [mean(plain("lora", c, s, {"lr": 0.01})["test"] for s in (0, 1, 2)) for c in five]
    assert row["mean"] == pytest.approx(100 * mean(means))
    assert row["published"] == 84.34
    fewer = published_table(results(tmp_path / "b", conditions=five[:4]), load_publications())
    assert fewer is not None
    assert "all conditions" not in set(fewer.data["condition"])


def test_what_has_not_been_run_is_said(tmp_path: Path) -> None:
    data = results(tmp_path, lambda *_: None, conditions=("rte",))
    assert data.final.empty
    table = published_table(data, load_publications())
    assert table is None  # nothing is known of the metric either


def mismatched(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
    """MNLI has a second test set, on which the metric is a tenth lower."""
    found = plain(method, condition, seed, choice)
    return {**found, "test_mismatched": found["test"] - 0.1} if condition == "mnli" else found


def test_figures_on_the_mismatched_set_stand_beside_ours_on_it(tmp_path: Path) -> None:
    data = results(tmp_path, mismatched, conditions=("mnli",), methods=("lora", "full_ft"))
    table = published_table(data, load_publications())
    assert table is not None
    bar = table.data[table.data["source"].str.contains("BAR") & (table.data["method"] == "full_ft")].iloc[0]
    matched = 100 * mean(mismatched("full_ft", "mnli", s, {"lr": 0.01})["test"] for s in (0, 1, 2))
    assert bar["published"] == 90.2
    assert bar["mean"] == pytest.approx(matched - 10)
    assert bar["shown_metric"] == f"Test accuracy (%) on test_mismatched (on test {matched:.1f})"


@pytest.mark.slow
def test_an_average_takes_the_mismatched_set_for_mnli_alone(tmp_path: Path) -> None:
    eight = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
    table = published_table(results(tmp_path, mismatched, conditions=eight), load_publications())
    assert table is not None
    (row,) = table.data[
        (table.data["condition"] == "all conditions") & (table.data["method"] == "lora")
    ].to_dict("records")
    means = [mean(plain("lora", c, s, {"lr": 0.01})["test"] for s in (0, 1, 2)) for c in eight]
    assert row["mean"] == pytest.approx(100 * (sum(means) - 0.1) / 8)
    assert row["shown_metric"] == "Average of the test metrics (mnli on test_mismatched)"


def test_a_run_without_the_second_test_set_has_no_figure(tmp_path: Path) -> None:
    """As one of other data: the matched set is not taken in its place without a word."""
    data = results(tmp_path, conditions=("mnli",), methods=("lora", "full_ft"))
    table = published_table(data, load_publications())
    assert table is not None
    bar = table.data[table.data["source"].str.contains("BAR")]
    assert bar["mean"].isna().all()


def test_full_fine_tuning_on_qqp_is_bars_table_10(tmp_path: Path) -> None:
    data = results(tmp_path, conditions=("qqp",), methods=("full_ft",))
    table = published_table(data, load_publications())
    assert table is not None
    assert set(table.data["published"]) == {92.2}


@pytest.mark.slow
def test_command_line_and_bad_files(tmp_path: Path) -> None:
    make(tmp_path / "results", conditions=("rte", "mrpc"))
    own = tmp_path / "own.yaml"
    own.write_text(
        "source: a <b>talk</b>\ntables:\n- setup: {model: small}\n  rows:\n"
        "  - {task: {name: glue, task: rte}, metric: accuracy, values: {lora: 70.0}}\n"
    )
    base = ["report", "demo", "--results", str(tmp_path / "results"), "--output", str(tmp_path / "out")]
    ran = CliRunner().invoke(cli.app, [*base, "--published-file", str(own), "--html"])
    assert ran.exit_code == 0, ran.output
    text = (tmp_path / "out/demo/README.md").read_text()
    assert "<summary>Beside published figures</summary>" in text
    assert "a &lt;b&gt;talk&lt;/b&gt;" in text
    assert "<b>talk" not in (tmp_path / "out/demo/index.html").read_text()
    own.write_text(
        "source: x\ntables: [{setup: {}, rows: [{task: {name: glue}, metrik: a, values: {lora: 1}}]}]\n"
    )
    with pytest.raises(InputError, match=r"own\.yaml: tables\.0\.rows\.0\.metric: missing"):
        load_publications([own])
    with pytest.raises(InputError, match="not readable"):
        load_publications([tmp_path / "gone.yaml"])


def test_results_without_their_tasks_say_what_to_do(tmp_path: Path) -> None:
    folder = make(tmp_path)
    content = folder.read()
    del content["tasks"]
    folder.write(content)
    with pytest.raises(InputError, match="`flatbench run` on the finished study adds it"):
        published_table(Results.load(folder), load_publications())


@pytest.mark.parametrize("name", ["paper-glue", "paper-few-shot"])
def test_the_paper_studies_have_published_figures(name: str, tmp_path: Path) -> None:
    """What a study's own tasks and methods are called is what the figures are filed under."""
    content, _ = read(name)
    (options,) = (  # a key may name further options, which change with the task
        [value[0] if isinstance(value, list) else value for value in values]
        for key, values in content["grid"].items()
        if key.partition(",")[0] == "task.task"
    )
    names = [m if isinstance(m, str) else m["name"] for m in content["methods"]]
    assert name in predefined()
    filed = {
        (row.task.get("task"), method)
        for publication in load_publications()
        for table in publication.tables
        for row in table.rows
        if row.task["name"] == content["task"]["name"]
        for method in row.values
    }
    assert len([1 for task in options for method in names if (task, method) in filed]) >= 10
