"""Pages hold against WCAG's rules of level AA by axe-core, whole pages stay short, and print."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("accessibility", ROOT / "tools" / "accessibility.py")
assert _spec is not None
assert _spec.loader is not None
accessibility: ModuleType = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(accessibility)

PAGES = sorted((ROOT / "reports").glob("*/index.html"))
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(accessibility.browser() is None, reason="no Chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("npm") is None:
        pytest.skip("no npm here")
    try:
        return str(accessibility.axe(tmp_path_factory.mktemp("axe")))
    except subprocess.SubprocessError:
        pytest.skip("no registry of npm from here")


@pytest.mark.parametrize("width", accessibility.WIDTHS)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_no_rule_is_violated(page: Path, width: int, axe: str) -> None:
    found = accessibility.check(page, width, accessibility.browser(), axe)
    assert found["violations"] == []
    assert "color-contrast" in found["passes"]  # it was looked at
    if width == 1280:  # with every section open; 12 is the goal of the page of 450 runs
        most = 12 if page.parent.name == "sharpness-vs-generalization" else 13
        assert found["screens"] <= most


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_it_prints(page: Path, tmp_path: Path) -> None:
    """To a file of a few pages: what is folded is not on paper."""
    made = tmp_path / "printed.pdf"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    options += [f"--user-data-dir={tmp_path}/profile", f"--print-to-pdf={made}"]
    subprocess.run(
        [accessibility.browser(), *options, page.as_uri()], capture_output=True, check=True, timeout=120
    )
    pages = made.read_bytes().count(b"/Type /Page\n")
    assert 1 <= pages <= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_it_is_small_enough_to_be_mailed(page: Path) -> None:
    assert page.stat().st_size <= 800_000
