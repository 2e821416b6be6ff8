"""Work beside a process's own: the same results, and what goes wrong in it is not lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  # a process that has loaded it forks none

from flatbench.report import Results, write_report
from tests.report.synthetic import make
from tests.report.test_document import contents

WORK = """
import os, signal, sys
from flatbench.machine import beside as room
from flatbench.errors import InputError

def here(): return os.getpid()
def wrong(): raise InputError("what went wrong")
def killed():
    if os.getpid() != parent: os.kill(os.getpid(), signal.SIGKILL)
    return "done here"

parent = os.getpid()
assert room._forkable() == (len(os.sched_getaffinity(0)) > 1)
one, other = room.beside(here), room.beside(killed)
print(one() != parent, other())
try:
    room.beside(wrong)()
except InputError as error:
    print(error)
import torch
print(room.beside(here)() == parent)
"""
WRITE = """
import sys
from pathlib import Path
from flatbench.report import Results, write_report
from flatbench.report.analysis import results
from flatbench.store import StudyFolder
results._LARGE = 0  # so that it is read beside, as a study of thousands of runs is
write_report(Results.load(StudyFolder(Path(sys.argv[1]), "demo")), sys.argv[2], html=True)
"""


def _run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_what_is_done_beside_comes_back() -> None:
    first, wrong, with_torch = _run(WORK).splitlines()
    assert first.endswith("done here")
    assert (wrong, with_torch) == ("what went wrong", "True")


@pytest.mark.slow
def test_what_is_read_and_drawn_beside_is_what_is_read_and_drawn_here(tmp_path: Path) -> None:
    made = make(tmp_path / "results", measures=("sam_sharpness_merged",))
    write_report(Results.load(made), tmp_path / "here", html=True)
    _run(WRITE, str(tmp_path / "results"), str(tmp_path / "beside"))
    here, beside = (contents(tmp_path / where) for where in ("here", "beside"))
    assert sorted(here) == sorted(beside)
    assert [name for name in here if here[name] != beside[name]] == []
