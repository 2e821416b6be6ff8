"""The arrows between rooms point one way, and the light entry points stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flatbench

PACKAGE = Path(flatbench.__file__).parent

# room -> rooms that it may not import
FORBIDDEN = {
    "optim": {"tasks", "measures", "runs", "training", "store", "report", "executors", "cli", "study"},
    "curvature": {"models", "optim", "tasks", "measures", "runs", "training", "store", "report", "study"},
    "tasks": {"optim", "measures", "runs", "training", "report", "executors", "cli", "study"},
    "measures": {"optim", "tasks", "runs", "training", "store", "report", "executors", "cli", "study"},
    "landscape": {"optim", "tasks", "runs", "training", "report", "executors", "cli", "study"},
    "report": {
        "optim",
        "tasks",
        "measures",
        "runs",
        "training",
        "models",
        "executors",
        "cli",
        "curvature",
    },
    "store": {"optim", "tasks", "measures", "runs", "training", "report", "executors", "cli", "curvature"},
    "models": {"optim", "tasks", "measures", "runs", "training", "report", "executors", "cli"},
    "runs": {"report", "executors", "cli"},
}
NO_TORCH = ["flatbench", "flatbench.cli", "flatbench.study", "flatbench.store", "flatbench.report"]


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", FORBIDDEN)
def test_rooms_import_in_one_direction(room: str) -> None:
    assert files_of(room)
    for path in files_of(room):
        rooms = {name.split(".")[1] for name in imports_of(path) if name.startswith("flatbench.")}
        assert not rooms & FORBIDDEN[room], f"{path.name} imports {rooms & FORBIDDEN[room]}"


def test_curvature_imports_torch_and_nothing_heavier() -> None:
    for path in files_of("curvature"):
        outside = {name.split(".")[0] for name in imports_of(path)} & {"transformers", "peft", "accelerate"}
        assert not outside


@pytest.mark.brief
@pytest.mark.parametrize("module", NO_TORCH)
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.brief
def test_help_loads_neither_torch_nor_pandas() -> None:
    code = (
        "import sys\nfrom flatbench.cli import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "sys.exit(bool({'torch', 'pandas', 'matplotlib', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
