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


def kinds(cells: list[Any]) -> list[str]:
    return [output["output_type"] for cell in cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all: the study that one makes serves the next."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.long  # with smaller numbers, every cell of theirs is run below
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers' Trainer imports DeepSpeed where it is installed, which prints what device it found
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    fresh = kinds(executor().execute(path, working_folder).cells)
    assert fresh == [output["output_type"] for output in outputs(path)]  # they are those of these cells
    assert "error" not in fresh


#: smaller numbers for what takes the time; each must be found
STUDY = {
    "train_size: 200": "train_size: 64",
    "pretrain_epochs: 20": "pretrain_epochs: 1",
    "train: {epochs: 15": "train: {epochs: 2",
    "seeds: [0, 1]": "seeds: [0]",
}
SMALLER = {
    "1-finished-study": {
        **STUDY,
        "points=31, draws=4": "points=5, draws=2",
        "adaptive=True)": "adaptive=True, points=9)",
        "points=25": "points=5",
    },
    "2-my-own-checkpoint": {
        "epochs=25": "epochs=1",
        "epochs=30": "epochs=2",
        "train_size=300": "train_size=64",
        "points=25": "points=5",
        "draws=4": "draws=2",
    },
    # the same study, which is there by then
    "3-the-argument": {**STUDY, "flatbench run small.yaml": "ls results/small", "points=25": "points=5"},
    "4-stock-trainer": {
        '"train_size": 200': '"train_size": 64',
        '"pretrain_epochs": 20': '"pretrain_epochs": 1',
        "epochs=20": "epochs=3",
        "points=17": "points=5",
        "points=25, draws=4": "points=5, draws=2",
    },
}


@pytest.mark.slow
def test_every_cell_runs_with_smaller_numbers(
    tmp_path: Path, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one kernel, which loads torch once and forgets all names after each."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    execute = executor().execute
    import nbformat

    whole, ends = nbformat.v4.new_notebook(), []
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        for large, small in SMALLER[path.stem].items():
            assert any(large in source for source in sources), f"{path.stem} has no {large}"
            sources = [source.replace(large, small) for source in sources]
        whole.metadata = notebook.metadata
        whole.cells += [nbformat.v4.new_code_cell(source) for source in (*sources, "%reset -f")]
        ends.append(len(whole.cells))
    nbformat.write(whole, tmp_path / "all.ipynb")
    folder = working_folder / "smaller"
    folder.mkdir()
    cells = execute(tmp_path / "all.ipynb", folder).cells
    for path, first, last in zip(NOTEBOOKS, [0, *ends], ends, strict=False):
        fresh = kinds(cells[first:last])
        assert fresh == [output["output_type"] for output in outputs(path)], path.stem
        assert "error" not in fresh


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
