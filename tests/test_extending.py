"""The examples of docs/extending.md work as they stand, as a third party's package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flatbench import store

pytestmark = pytest.mark.slow


PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
STUDY = {
    "name": "own",
    "task": {"name": "blobs", "separation": 3},
    "methods": ["lora", {"name": "sign_sam", "optimizer": {"name": "sign_sam", "rho": 1e-4}}],
    "train": {"epochs": 3, "lr": 1e-2, "threads": 1},
    "seeds": [0],
    "measures": ["weight_norm"],
}


def examples() -> dict[str, str]:
    """The page's examples by the names of their files."""
    text = PAGE.read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", text, re.DOTALL))
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip would make it: the package, and the metadata with its entry points."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, code in examples().items():
        (package / name).write_text(code, encoding="utf-8")
    metadata = folder / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    points = re.sub(r'\[project\.entry-points\."(.*?)"\]', r"[\1]", toml).replace('"', "")
    (metadata / "entry_points.txt").write_text(points)
    return folder


def flatbench(site: Path, cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from flatbench.cli import main; main()", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{PAGE.parent.parent}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_listed_with_their_first_lines(site: Path, tmp_path: Path) -> None:
    text = flatbench(site, tmp_path, "list")
    for line in (
        "SAM with the gradient's signs",
        "Two Gaussian clouds of 4x4 images",
        "Euclidean norm of the weights",
    ):
        assert line in text


@pytest.mark.parametrize("name", ["sign_sam.py", "blobs.py", "weight_norm.py"])
def test_they_pass_the_linter_of_this_repository(name: str) -> None:
    """A contributor starts from them; every argument has a type, or mypy's strict mode would say so."""
    options = [
        "check",
        "--extend-select",
        "ANN",
        "--ignore",
        "ANN401",
        "--stdin-filename",
        f"flatbench/{name}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *options, "-"],
        cwd=PAGE.parent.parent,
        input=examples()[name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_study_uses_all_three(site: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(STUDY))
    flatbench(site, tmp_path, "run", "own.yaml")
    table = store.table(store.StudyFolder(tmp_path / "results", "own"))
    assert set(table["state"]) == {"done"}
    assert set(table["method"]) == {"lora", "sign_sam"}
    assert (table["weight_norm.l2"] > 0).all()
    assert (table["test.accuracy"] > 0.9).all()
