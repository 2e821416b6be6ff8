"""Results that somebody sends: no text in them computes, is markup, or leads out of the report's folder."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest

from flatbench.errors import InputError
from flatbench.report import Results, open_results, write_report
from flatbench.report.analysis import archive
from flatbench.report.figures import all as figures
from flatbench.report.figures import style
from flatbench.report.tables import render
from flatbench.report.tables.averages import Table
from flatbench.store import StudyFolder
from tests.report.synthetic import make

MATHS = r"$\frac{1}$ a$b \input{/etc/passwd}"


def test_a_spreadsheet_computes_nothing() -> None:
    """CSV has no way to say that a cell is text, so a formula gets the apostrophe that makes it one."""
    formulas = ["=HYPERLINK(1)", "+1+cmd|'/C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1"]
    harmless = ["lora", "a=b", "", "a =-1"]
    frame = pd.DataFrame({"=name": [*formulas, *harmless], "n": range(-3, 7), "mixed": [*[None] * 9, -0.5]})
    text = render.to_csv(Table("t", "T", frame, ()))
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["'=name", "n", "mixed"]
    assert [row[0] for row in rows[1:]] == [*(f"'{f}" for f in formulas), *harmless]
    assert [row[1] for row in rows[1:]] == [str(n) for n in range(-3, 7)]
    assert rows[-1][2] == "-0.5"
    lines = render.to_csv(Table("t", "T", pd.DataFrame({"a": ["x\r=1\n=2"]}), ())).split("\r")
    assert len(lines) == 1


CONTROLS = "\x1b[2J\x9b31m\u202etxt.exe\u2066\x08"


@pytest.mark.drawn
@pytest.mark.slow
def test_csv_and_svg_hold_no_control_characters(tmp_path: Path) -> None:
    frame = pd.DataFrame({f"name{CONTROLS}": [f"a\n{CONTROLS}", 1.5]})
    text = render.to_csv(Table("t", "T", frame, ()))
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert "1.5" in text
    with style.styled():
        figure, (axis,) = style.panels(1)
        axis.set_title(CONTROLS)
        axis.set_xlabel(CONTROLS)
        axis.plot([1, 2], label=CONTROLS)
        axis.set_xticks([1], [CONTROLS])
        style.legend(figure, {CONTROLS: axis.lines[0]})
        names = style.save(figure, tmp_path, "one")
    svg = (tmp_path / names[2]).read_text()
    assert all(c.isprintable() or c in "\n\t" for c in svg)
    assert svg.count("u202etxt.exe") == 4
    ElementTree.fromstring(svg)


def hostile(tmp_path: Path) -> Results:
    """Results with hostile names of a method, a condition, a metric, a hyper-parameter and a measure."""
    loaded = Results.load(make(tmp_path, conditions=("", "x=" + MATHS), tuned=False))  # to be changed
    content = loaded.content
    content["methods"][1] = MATHS  # type: ignore[index]
    content["budget"][MATHS] = content["budget"].pop("sam")  # type: ignore[index]
    for frame in (loaded.table, loaded.history, loaded.slices):
        frame["method"] = frame["method"].replace("sam", MATHS)
    loaded.slices["label"] = "../../" + MATHS
    renamed = {"hyper.lr": f"hyper.{MATHS}/../x"}
    renamed |= {f"{s}.accuracy": f"{s}.{MATHS}" for s in ("train", "validation", "test")}
    table = loaded.table.rename(columns=renamed).assign(metric=MATHS)
    return replace(loaded, table=table, history=loaded.history.rename(columns=renamed))


@pytest.mark.drawn
@pytest.mark.slow
def test_figures_show_mathematics_as_text(tmp_path: Path) -> None:
    loaded = hostile(tmp_path)
    with style.styled():
        made = list(figures.all_figures(loaded))
        assert {f.name.split("_")[0] for f in made} >= {"metric", "slices", "sensitivity"}
        for figure in made:
            names = style.save(figure.figure, tmp_path / "out" / "figures", figure.name)
            svg = (tmp_path / "out" / "figures" / names[2]).read_text()
            assert r"$\frac{1}$" in svg.replace("\n", "")
    written = [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.suffix == ".svg"]
    assert set(written) == {("out", "figures")}


@pytest.mark.slow
def test_a_report_of_hostile_results_stays_in_its_folder(tmp_path: Path) -> None:
    loaded = hostile(tmp_path / "in")
    before = set(tmp_path.rglob("*"))
    write_report(loaded, tmp_path / "a" / "out", html=True)
    made = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert all((tmp_path / "a" / "out") in path.parents for path in made)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/b", ""])
def test_a_studys_name_does_not_choose_the_folder(tmp_path: Path, name: str) -> None:
    loaded = Results.load(make(tmp_path / "in"))  # its own: what `results` gives is shared by all tests
    loaded.content["study"]["name"] = name
    archive.save(loaded, tmp_path / "sent")
    with pytest.raises(InputError, match="a study's name is made of letters"):
        open_results(str(tmp_path / "sent"))


@pytest.mark.parametrize("run", ["../../../x", "/etc", "", None, 3, "0123456789ABCDEF"])
def test_a_list_of_runs_leads_to_runs_only(tmp_path: Path, run: object) -> None:
    folder: StudyFolder = make(tmp_path)
    content = folder.read()
    content["runs"][0]["id"] = run
    folder.write(content)
    with pytest.raises(InputError, match=r"study\.json: damaged \(a run called"):
        folder.directories()
    with pytest.raises(InputError, match=r"study\.json: damaged \(a run called"):
        folder.places()
