"""The notebooks run from their first cell to their last, and what is committed is light and clean."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: bytes of a notebook with its outputs
LIMIT = 1_000_000
#: the folder that the repository lies in; itself, if that is the root of the file system
HERE = str(FOLDER.parents[1]).rstrip("/") or str(FOLDER.parent)
#: places of one machine only: the usual ones, and where this repository lies
PLACES = re.compile(rf"(?<![\w.])(/home/|/root/|/tmp/|{re.escape(HERE)}/|/Users/|/usr/|/opt/|[A-Z]:\\\\)")


def executor() -> Any:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outputs(path: Path) -> list[dict[str, Any]]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_there_are_four() -> None:
    assert len(NOTEBOOKS) == 4


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: the study that one makes serves the next."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers' Trainer imports DeepSpeed where it is installed, which prints what device it found
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    fresh = executor().execute(path, working_folder)
    kinds = [output["output_type"] for cell in fresh.cells for output in cell.get("outputs", [])]
    committed = [output["output_type"] for output in outputs(path)]
    assert kinds == committed  # the committed outputs are those of these cells
    assert "error" not in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_light_and_names_no_machine(path: Path) -> None:
    assert path.stat().st_size < LIMIT
    assert not PLACES.search(path.read_text(encoding="utf-8"))
    cells = [
        cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs(path)) >= 1
    assert not any(output.get("name") == "stderr" for output in outputs(path))
