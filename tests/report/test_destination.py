"""A report is not written over a committed one unless that is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flatbench import cli, report
from flatbench.report.placing import destination
from tests.report.synthetic import make, results

pytestmark = pytest.mark.slow


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a committed report of a study `demo`, as the working directory."""
    place = tmp_path / "clone"
    (place / "reports" / "demo").mkdir(parents=True)
    (place / "reports" / "demo" / "README.md").write_text("committed\n")
    for command in (["init", "-q"], ["add", "reports"]):
        subprocess.run(["git", *command], cwd=place, check=True)
    monkeypatch.chdir(place)
    return place


def test_a_committed_report_stays(clone: Path) -> None:
    folder, why = destination(None, "demo")
    assert folder == Path("local/reports/demo")
    assert "reports/demo is committed" in why
    assert destination(None, "other") == (Path("reports/other"), "")
    (clone / "reports" / "mine").mkdir()
    assert destination(None, "mine") == (Path("reports/mine"), "")  # a report that git does not know
    assert destination("reports", "demo") == (Path("reports/demo"), "")  # asked for


def test_outside_a_checkout_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reports" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert destination(None, "demo") == (Path("reports/demo"), "")
    monkeypatch.setenv("PATH", "")
    assert destination(None, "demo") == (Path("reports/demo"), "")


def test_the_command_line_says_where_it_went(clone: Path, tmp_path: Path) -> None:
    make(tmp_path / "r", measures=("cost",))
    for _ in range(2):
        ran = CliRunner().invoke(cli.app, ["report", "demo", "--results", str(tmp_path / "r")])
        assert ran.exit_code == 0, ran.output
        text = " ".join(ran.output.split())
        assert "reports/demo is committed and stays as it is" in text
        assert "files in local/reports/demo; README.md is the one to open" in text
        assert text.index("Highest mean test accuracy") < text.index("Method")
    assert (clone / "reports" / "demo" / "README.md").read_text() == "committed\n"


def test_from_python_too(clone: Path, tmp_path: Path) -> None:
    report(results(tmp_path / "r", measures=("cost",)))
    assert (clone / "reports" / "demo" / "README.md").read_text() == "committed\n"
    assert (clone / "local" / "reports" / "demo" / "README.md").is_file()
