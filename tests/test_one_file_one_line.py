"""A plug-in of the package is one file and one line of its kind's registry: nothing else changes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import yaml

from flatbench import store
from tests.test_extending import examples

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXECUTOR = '''"""Runs in this process, the last one first."""

from collections.abc import Sequence
from pathlib import Path

from flatbench.executors.local import Local


class LastFirst(Local):
    """Takes on what it is given in the reverse order."""

    def __init__(self, *, jobs: int = 1) -> None:
        super().__init__(jobs=jobs)

    def submit(self, paths: Sequence[Path]) -> None:
        print("last first")
        super().submit(paths[::-1])
'''
#: room -> the file that is added, and the name and class of the line
PLUGINS = {
    "optim": ("sign_sam.py", "sign_sam", "SignSAM"),
    "tasks": ("blobs.py", "blobs", "Blobs"),
    "measures": ("weight_norm.py", "weight_norm", "WeightNorm"),
    "executors": ("last_first.py", "last_first", "LastFirst"),
}
LINES = [
    "SAM with the gradient's signs: the worst case of a box around the weights.",
    "Two Gaussian clouds of 4x4 images, some way apart.",
    "Euclidean norm of the weights that trained.",
    "Takes on what it is given in the reverse order.",
]
STUDY = {
    "name": "own",
    "task": {"name": "blobs", "separation": 3},
    "methods": ["lora", {"name": "sign_sam", "optimizer": {"name": "sign_sam", "rho": 1e-4}}],
    "train": {"epochs": 1, "lr": 1e-2, "threads": 1},
    "tune": {"grid": {"lr": [1e-3, 1e-2]}, "seeds": [100]},
    "seeds": [0],
    "measures": ["weight_norm"],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a new plug-in of each kind."""
    folder = tmp_path_factory.mktemp("checkout")
    package = shutil.copytree(
        ROOT / "flatbench", folder / "flatbench", ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "studies").symlink_to(ROOT / "studies")
    files = {**examples(), "last_first.py": EXECUTOR}
    for room, (file, name, kind) in PLUGINS.items():
        (package / room / file).write_text(files[file], encoding="utf-8")
        registry = package / room / "__init__.py"
        head, brace, rest = registry.read_text(encoding="utf-8").partition(",\n    {\n")
        line = f'        "{name}": "flatbench.{room}.{file.removesuffix(".py")}:{kind}",\n'
        registry.write_text(head + brace + line + rest, encoding="utf-8")
    return folder


def python(checkout: Path, cwd: Path, code: str, arguments: Sequence[str] = ()) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def flatbench(checkout: Path, cwd: Path, *arguments: str) -> str:
    return python(checkout, cwd, "from flatbench.cli import main; main()", arguments)


def test_listed_with_their_first_lines(checkout: Path, tmp_path: Path) -> None:
    text = flatbench(checkout, tmp_path, "list")
    for line, (_, name, _) in zip(LINES, PLUGINS.values(), strict=True):
        assert name in text
        assert line in text


def test_an_optimizer_is_exported(checkout: Path, tmp_path: Path) -> None:
    code = (
        "import flatbench, sys\n"
        "from flatbench import optim\n"
        "assert 'SignSAM' in optim.__all__ and 'torch' not in sys.modules\n"
        "from flatbench.optim import SignSAM\n"
        "print(flatbench.__file__, SignSAM.__module__)"
    )
    assert python(checkout, tmp_path, code).split() == [
        str(checkout / "flatbench" / "__init__.py"),
        "flatbench.optim.sign_sam",
    ]


def test_a_study_runs_with_all_of_them_and_is_reported(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(STUDY))
    assert "last first" in flatbench(checkout, tmp_path, "run", "own.yaml", "--executor", "last_first")
    table = store.table(store.StudyFolder(tmp_path / "results", "own"))
    assert set(table["state"]) == {"done"}
    assert set(table["method"]) == {"lora", "sign_sam"}
    assert (table.loc[table["stage"] == "final", "weight_norm.l2"] > 0).all()
    flatbench(checkout, tmp_path, "report", "own", "--output", "report")
    (page,) = (tmp_path / "report").rglob("README.md")
    assert "sign_sam" in page.read_text(encoding="utf-8")
    assert "weight_norm.l2" in pd.read_parquet(page.parent / "results.parquet").columns
