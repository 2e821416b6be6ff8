"""The documentation site: it builds without a warning, and every public name has an entry."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
#: what the reference covers: whatever `__all__` of these names
PUBLIC = (
    "flatbench",
    "flatbench.callbacks",
    "flatbench.curvature",
    "flatbench.landscape",
    "flatbench.optim",
    "flatbench.optim.base",
    "flatbench.optim.buffers",
    "flatbench.optim.two_points",
    "flatbench.report",
    "flatbench.store",
    "flatbench.study",
)
PLUGINS = ("flatbench.optim", "flatbench.tasks", "flatbench.measures", "flatbench.executors")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the reference of the site, all of which is read and whose links are followed."""
    for needed in ("sphinx", "furo", "myst_nb", "sphinx_copybutton"):
        pytest.importorskip(needed, reason="the site needs: pip install 'flatbench-lora[docs]'")
    folder = tmp_path_factory.mktemp("site")
    # as `make docs`, but writing no pages, which is half of the time
    options = ["--fail-on-warning", "--keep-going", "--nitpicky", "--quiet", "--builder", "dummy"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "-c", "docs", ".", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    environment = pickle.loads((folder / ".doctrees/environment.pickle").read_bytes())
    return set(environment.domaindata["py"]["objects"])


def test_every_public_name_has_an_entry(entries: set[str]) -> None:
    public = {
        f"{package.__name__}.{name}"
        for package in map(importlib.import_module, PUBLIC)
        for name in package.__all__
        if name != "__version__" and not isinstance(getattr(package, name), ModuleType)
    }
    assert sorted(public - entries) == []


def test_every_plugin_has_an_entry(entries: set[str]) -> None:
    for package in map(importlib.import_module, PLUGINS):
        for name in package.REGISTRY.names():
            plugin = package.REGISTRY.load(name)
            assert {
                f"{package.__name__}.{plugin.__name__}",
                f"{plugin.__module__}.{plugin.__name__}",
            } & entries


def test_methods_that_plugins_fill_have_entries(entries: set[str]) -> None:
    assert {"flatbench.tasks.base.Task.build_model", "flatbench.executors.base.Executor.submit"} <= entries
    assert "flatbench.Checkpoint.hessian" in entries
    assert "flatbench.errors.InputError" in entries
