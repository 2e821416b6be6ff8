"""Rooms in order: imports go down, modules import no one who imports them, light entry points stay light."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

import flatbench

PACKAGE = Path(flatbench.__file__).parent
README = Path(__file__).parents[1] / "README.md"

#: from the top floor to the ground; a room imports only from rooms below it. The README draws the same list
ROOMS = (
    "cli",
    "orchestration",
    "executors",
    "estimate",
    "callbacks",
    "notebook",
    "runs",
    "study",
    "training",
    "measures",
    "tasks",
    "optim",
    "landscape",
    "models",
    "distributed",
    "report",
    "store",
    "config",
    "subject",
    "security",
    "curvature",
    "machine",
)
#: modules below all rooms
GROUND = ("errors", "seeding", "sums", "labels", "version")
NO_TORCH = ["flatbench", "flatbench.cli", "flatbench.study", "flatbench.store", "flatbench.report"]


def modules_of(package: Path) -> dict[str, Path]:
    """Every module's dotted name and file."""
    paths = sorted(package.rglob("*.py"))
    names = (".".join(path.relative_to(package.parent).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def faults(package: Path) -> list[str]:
    """What breaks the order: modules outside a room, and imports from a room that is not below."""
    floor = {room: i for i, room in enumerate((*ROOMS, *GROUND))}
    found = []
    for name, path in modules_of(package).items():
        if name in ("flatbench", "flatbench.__main__"):  # what they offer is loaded when it is used
            continue
        room = name.split(".")[1]
        if room not in floor or (path.parent == package and room not in GROUND):
            found.append(f"{name} stands in no room")
            continue
        for target in imports_of(path):
            other = target.split(".")[1:2]
            if not target.startswith("flatbench.") or other[0] not in floor or other[0] == room:
                continue
            if floor[other[0]] < floor[room] or room in GROUND:
                found.append(f"{name} imports {target}, which is above it")
    return found


def circles(package: Path) -> list[list[str]]:
    """Modules that import each other, in whatever number of steps."""
    modules = modules_of(package)
    graph = nx.DiGraph()
    for name, path in modules.items():
        targets = imports_of(path) & modules.keys()
        # `from flatbench.store import files` needs the module; the package is loaded before either
        parents = {target.rpartition(".")[0] for target in targets}
        graph.add_edges_from((name, target) for target in targets - parents - {name})
    return [sorted(found) for found in nx.strongly_connected_components(graph) if len(found) > 1]


def test_a_room_imports_only_from_rooms_below() -> None:
    assert faults(PACKAGE) == []


def test_no_modules_import_each_other() -> None:
    assert circles(PACKAGE) == []


def test_the_readme_draws_the_same_rooms() -> None:
    text = README.read_text(encoding="utf-8")
    drawn = re.findall(r"^  (\w+)/ ", text.partition("flatbench/\n")[2].partition("```")[0], flags=re.M)
    assert drawn == list(ROOMS)
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.slow
def test_what_is_out_of_order_is_found(tmp_path: Path) -> None:
    package = tmp_path / "flatbench"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "utils.py").write_text('"""A module without a room."""\n')
    (package / "errors.py").open("a").write("\n\ndef f():\n    from flatbench.store import files\n")
    (package / "store" / "claims.py").open("a").write("\n\nimport flatbench.report.page\n")
    (package / "store" / "files.py").open("a").write("\n\nfrom flatbench.store import claims\n")
    found = faults(package)
    expected = (
        "utils stands in no room",
        "errors imports flatbench.store",
        "claims imports flatbench.report",
    )
    for text in expected:
        assert any(text in fault for fault in found), text
    assert any({"flatbench.store.claims", "flatbench.store.files"} <= set(c) for c in circles(package))


def test_curvature_imports_torch_and_nothing_heavier() -> None:
    for path in (PACKAGE / "curvature").rglob("*.py"):
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


def test_files_are_one_thing_each() -> None:
    """The longest are to be asked which two things they are."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > 400} == {}
