"""The report as files: complete, reproducible byte for byte, safe whatever names hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from flatbench.errors import InputError
from flatbench.report import Results, write_report
from tests.report.synthetic import make, plain, results


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.drawn
@pytest.mark.slow
def test_same_results_same_bytes(tmp_path: Path) -> None:
    folder = make(tmp_path, conditions=("noise=0.0",))
    first = write_report(Results.load(folder), tmp_path / "first")
    write_report(Results.load(folder), tmp_path / "second")
    one, two = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert sorted(first.files) == sorted(one)
    assert one == two
    assert {"README.md", "results.md", "results.csv", "results.tex", "study.yaml", "findings.json"} <= set(
        one
    )


@pytest.mark.slow
def test_the_readme_shows_what_exists(tmp_path: Path) -> None:
    write_report(results(tmp_path), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len([t for t in targets if t.endswith(".png")]) >= 6
    for target in targets:
        assert (tmp_path / "out" / target).exists(), target
    for heading in ("What was found", "Methods at a glance", "How it was made"):
        assert f"## {heading}" in text
    for folded in ("Flatness", "Cost", "Figures", "Differences to lora", "Every statement"):
        assert re.search(f"<summary>[^<]*{folded}</summary>", text)
    assert text.index("What was found") < text.index("![") < text.index("Before you rely on it")
    assert "flatbench run study.yaml" in text
    assert "some processor" in text
    assert "12 runs on cpu" in text
    assert yaml.safe_load((tmp_path / "out/study.yaml").read_text())["name"] == "demo"


@pytest.mark.slow
def test_incomplete_studies_say_what_is_missing(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        if method == "sam" and seed == 1:
            return {"state": "diverged", "error": "DivergedError: the loss is nan"}
        return None if method == "sam" and seed == 2 else plain(method, condition, seed, choice)

    report = write_report(results(tmp_path, outcomes), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "sam: 1 of 3 final runs diverged (seed 1: the loss is nan)." in report.notes
    assert "- sam: 1 of 3 final runs diverged (seed 1: the loss is nan)." in text
    assert "- sam: 1 of 3 final runs are not finished." in text
    assert "1 of 3 (1 diverged, 1 unfinished)" in text


def test_nothing_final_yet(tmp_path: Path) -> None:
    write_report(results(tmp_path, lambda *_: None), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert "No final run has a test metric yet." in text
    assert "## Figures" not in text


HOSTILE = "a_b% $x$ | <script>alert(1)</script> `c` {d} # & \\end{table} \n![y](z)"


@pytest.mark.slow
def test_hostile_names_break_nothing(tmp_path: Path) -> None:
    """Names as hostile as hand-made results can hold; study files allow none of this."""
    from markdown_it import MarkdownIt

    folder = make(tmp_path / "results", description=HOSTILE, conditions=("", "x=" + HOSTILE))
    content = folder.read()
    content["study"]["name"] = HOSTILE
    content["methods"] = ["lora", HOSTILE]
    content["budget"][HOSTILE] = content["budget"].pop("sam")
    for entry in content["selection"]:
        entry["method"] = entry["method"].replace("sam", HOSTILE)
    folder.write(content)
    loaded = Results.load(folder)
    for frame in (loaded.table, loaded.history, loaded.slices):
        frame["method"] = frame["method"].replace("sam", HOSTILE)
    loaded.table["error"] = HOSTILE
    write_report(loaded, tmp_path / "out")
    for path in (tmp_path / "out").glob("*.md"):
        text = path.read_text()
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        own = {"<details>", "</details>"}
        blocks = [line for t in tokens if t.type.startswith("html") for line in t.content.splitlines()]
        folds = [line for line in blocks if line not in own]
        assert all(re.fullmatch(r"<summary>[^<>]*</summary>", line) for line in folds), folds
        inline = [c for t in tokens if t.type == "inline" for c in t.children or []]
        assert not [c for c in inline if c.type == "html_inline"]
        images = [c for c in inline if c.type == "image"]
        assert all(str(c.attrs["src"]).startswith("figures/") for c in images)
    for path in (tmp_path / "out").glob("*.tex"):
        text = path.read_text()
        assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}")
        assert text.count(r"\end{table}") == text.count(r"\begin{table}")
        body = re.sub(r"\\[&%$#_{}]", "", text)
        columns = {line.count("&") for line in body.splitlines() if line.endswith(r"\\")}
        assert len(columns) == 1


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="a file is where a folder should be"):
        write_report(results(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("name", ["quickstart", "small"])
@pytest.mark.slow
def test_the_study_file_of_a_report_is_the_study(tmp_path: Path, name: str) -> None:
    """`flatbench run study.yaml` makes the runs that the report was made from, overrides included."""
    from flatbench.study import Study, load
    from tests.conftest import SMALL

    loaded = load(name, ["train.epochs=7"]) if name == "quickstart" else Study(SMALL, "small.yaml")
    folder = make(tmp_path, tuned=name == "quickstart")
    folder.write({**folder.read(), "study": loaded.file.model_dump(mode="json")})
    write_report(Results.load(folder), tmp_path / "out")
    again = load(str(tmp_path / "out/study.yaml"))
    assert again.name == loaded.name
    assert again.file.train.epochs == loaded.file.train.epochs
    assert again.measures == loaded.measures
    for one, other in zip(loaded.conditions, again.conditions, strict=True):
        assert (one.task, one.model, one.methods, one.trials) == (
            other.task,
            other.model,
            other.methods,
            other.trials,
        )
