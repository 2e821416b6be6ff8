"""Reports that are committed are what the committed code makes of their parquet; the page's examples run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyarrow import parquet

from flatbench.errors import InputError
from flatbench.report import Results, load_publications, open_results, write_report
from flatbench.store.files import read_parquet
from tests.report.synthetic import make
from tests.report.test_document import contents
from tests.test_protocol import script

ROOT = Path(__file__).parents[2]
REPORTS = sorted(path.parent for path in (ROOT / "reports").glob("*/results.parquet"))
#: what is in a report's folder and not written by `flatbench report`
READING, BASELINES = "reading.md", "baselines.csv"
#: how a font is rasterised differs from machine to machine; every number and word must not
DRAWN = ("figures/", "index.html")


def remade(report: Path, folder: Path) -> None:
    committed = {name: text for name, text in contents(report).items() if name not in (READING, BASELINES)}
    published = load_publications() if "published.csv" in committed else ()
    write_report(open_results(str(report)), folder, html="index.html" in committed, publications=published)
    found = contents(folder)
    assert sorted(found) == sorted(committed)
    for name in committed:
        if name.endswith(".parquet") and _writer(report / name) != _writer(folder / name):
            first, _ = read_parquet(report / name)
            pd.testing.assert_frame_equal(first, read_parquet(folder / name)[0])
        elif not name.startswith(DRAWN):
            assert found[name] == committed[name], name
    if "index.html" in committed:  # all of the page but the pictures in it
        first, second = (
            re.sub(rb"image/svg\+xml,[^\"]+", b"", pages["index.html"]) for pages in (found, committed)
        )
        assert first == second


def _writer(path: Path) -> str:
    """The library that wrote a parquet file: another version of it writes the same table in other bytes."""
    return str(parquet.read_metadata(path).created_by)


@pytest.mark.drawn
@pytest.mark.slow
def test_the_quickstart_report_is_remade_from_its_parquet(tmp_path: Path) -> None:
    remade(ROOT / "reports" / "quickstart", tmp_path)


@pytest.mark.long
@pytest.mark.drawn
@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.name)
def test_every_report_is_remade_from_its_parquet(report: Path, tmp_path: Path) -> None:
    remade(report, tmp_path)


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.name)
def test_no_report_names_a_machines_folders(report: Path) -> None:
    for name, content in contents(report).items():
        if not name.startswith("figures/"):
            assert not re.search(rb"/(work|home|root|tmp|Users)/", content), name


NUMBER = r"[+−-]?\d+(?:\.\d+)?"
INTERVAL = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]")


def statements_of(report: Path) -> list[dict[str, Any]]:
    content = json.loads((report / "findings.json").read_text(encoding="utf-8"))
    return list(content["statements"])


def intervals(text: str) -> set[tuple[str, ...]]:
    joined = " ".join(text.replace("−", "-").split())
    return {found.groups() for found in INTERVAL.finditer(joined)}


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.name)
def test_intervals_of_a_reading_page_are_those_of_its_findings(report: Path) -> None:
    known = intervals(" ".join(entry["text"] for entry in statements_of(report)))
    if (report / READING).exists():
        assert intervals((report / READING).read_text(encoding="utf-8")) <= known


#: further numbers of a reading page that its findings have: power, Kendall's τ, and means of eigenvalues
FURTHER = {
    "power": re.compile(rf"({NUMBER}) points or more"),
    "tau": re.compile(r"τ ([+-]\d\.\d\d)"),
    "seeds": re.compile(r"would take (\d+) to (\d+)|digits (\d+) to (\d+)"),
    "means": re.compile(r"geometric means ((?:[^()]|\([^()]*\))*?)(?:\)|\. )"),
}


def further(text: str) -> set[tuple[str, str]]:
    joined = " ".join(text.replace("−", "-").split())
    found = set()
    for kind, pattern in FURTHER.items():
        for match in pattern.finditer(joined):
            found |= {(kind, n) for group in match.groups() if group for n in re.findall(NUMBER, group)}
    return found


@pytest.mark.parametrize("report", REPORTS, ids=lambda path: path.name)
def test_further_numbers_of_a_reading_page_are_those_of_its_findings(report: Path) -> None:
    if not (report / READING).exists():
        return
    content = json.loads((report / "findings.json").read_text(encoding="utf-8"))
    known = " ".join([*content["answer"], *(entry["text"] for entry in content["statements"])])
    numbers = set(re.findall(NUMBER, known.replace("−", "-")))
    found = further((report / READING).read_text(encoding="utf-8"))
    assert found
    assert {number for _, number in found} <= numbers


def test_means_of_a_reading_page_are_those_of_its_table_of_perturbations() -> None:
    report = ROOT / "reports" / "interference"
    pattern = re.compile(rf"{NUMBER} ± {NUMBER}")
    table, text = (
        (report / name).read_text("utf-8").replace("−", "-") for name in ("interference.md", READING)
    )
    found = set(pattern.findall(" ".join(text.split())))
    assert len(found) >= 8
    assert found <= set(pattern.findall(table))
    # what its first sentence says, and the other studies' pages repeat
    rows = pd.read_csv(report / "interference.csv").query("measure == 'interference_small'")
    shares = rows.pivot(index="method", columns="perturbation", values="share_mean")
    assert (100 * shares["sam_cross"] / shares["sam"]).round(1).tolist() == [0.4] * 4


def test_further_numbers_of_the_overview_are_those_of_the_findings() -> None:
    content = [json.loads((r / "findings.json").read_text(encoding="utf-8")) for r in REPORTS]
    texts = [t for c in content for t in (*c["answer"], *(entry["text"] for entry in c["statements"]))]
    numbers = set(re.findall(NUMBER, " ".join(texts).replace("−", "-")))
    found = further((ROOT / "reports" / "README.md").read_text(encoding="utf-8"))
    assert {number for kind, number in found if kind == "seeds"} == {"118", "291", "15", "16"}
    assert {number for _, number in found} <= numbers


#: studies in which EFlat-LoRA is told from LoRA
WORSE = ("digits-power", "sst-minilm")


def test_the_overview_says_what_the_findings_say() -> None:
    text = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    entries = {report.name: statements_of(report) for report in REPORTS}
    found = intervals(text)
    assert len(found) >= 5
    assert found <= intervals(" ".join(e["text"] for own in entries.values() for e in own))
    claims = {(n, e["subject"], e["details"]["column"]) for n, own in entries.items() for e in own
              if e["kind"] == "difference" and e["claim"]}  # fmt: skip
    # no LoRA method with one gradient is told from plain LoRA, but where seeds suffice, and there it is worse
    single = {"eflat_lora", "flat_lora_rwp", "nbar", "obar", "bi_lora"}
    assert {(n, m) for n, m, _ in claims if m in single} == {(n, "eflat_lora") for n in WORSE}
    for name in WORSE:
        told = [e["text"] for e in entries[name] if e["kind"] == "difference" and e["claim"]]
        assert [text.rpartition(": ")[2] for text in told] == [
            "eflat_lora is below lora.",
            "eflat_lora is sharper than lora.",
        ]
    # SAM on digits and on the CNN, and SAM on all weights of the ViT, are flatter
    flat = {(n, m) for n, m, column in claims if column.endswith("eigenvalue_1")}
    assert {
        ("sharpness-vs-generalization", "sam"),
        ("fashion-cnn", "sam"),
        ("fashion-vit", "full_sam"),
    } <= flat
    assert not {m for n, m in flat if n not in WORSE} & {"flat_lora", "eflat_lora"}
    assert ("fashion-vit", "sam") not in flat
    # no sign of a relation is claimed anywhere
    assert not [e for own in entries.values() for e in own if e["kind"] == "relation" and e["claim"]]


def test_the_readme_says_what_the_findings_say() -> None:
    """Of the studies with power; what is printed of the quickstart is another machine's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("```")[0]
    found = intervals(text)
    assert len(found) >= 2
    assert found <= intervals(
        " ".join(e["text"] for report in REPORTS for e in statements_of(report) if e["role"] == "main")
    )


def test_the_figure_over_studies_draws_what_the_overview_says() -> None:
    across = script("across")
    text = (ROOT / "reports" / "README.md").read_text(encoding="utf-8").replace("−", "-")
    rows = re.findall(rf"^\| \[([\w-]+)\].*?({NUMBER}) \[.*?× ({NUMBER}) \[", text, flags=re.M)
    assert len(rows) == 4
    figure = across.draw([ROOT / "reports" / name for name, *_ in rows], "eflat_lora")
    for axis, column in zip(figure.axes, (1, 2), strict=True):
        drawn = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "s"]
        assert drawn == pytest.approx([float(row[column]) for row in rows], abs=0.05)
    with pytest.raises(InputError, match="quickstart: 0 main comparisons of lora"):
        across.comparison(ROOT / "reports" / "quickstart", "lora", "test")


@pytest.mark.slow
def test_the_examples_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "reports.md").read_text(encoding="utf-8")
    (python,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    (own,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    (tmp_path / "own.yaml").write_text(own)
    assert load_publications([tmp_path / "own.yaml"])[0].tables[0].rows[0].values["eflat_lora"] == 88.0
    folder = make(tmp_path / "results", name="quickstart")
    write_report(Results.load(folder), tmp_path / "reports/quickstart")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(python, names)
    assert (tmp_path / "somewhere/index.html").is_file()
    assert len(pd.read_parquet("somewhere/results.parquet")) == 12
