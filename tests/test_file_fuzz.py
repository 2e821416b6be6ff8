"""Files that somebody sends, damaged in any way: each is read, or refused in a line, in time and memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests import file_fuzzing, file_kinds
from tests.file_fuzzing import cases
from tests.file_kinds import Kind

pytestmark = pytest.mark.slow

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
CASES, SHARDS = 20_000, 10
_numbers = itertools.count()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return file_kinds.kinds(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def check(known: dict[str, Kind], name: str, files: dict[str, bytes], folder: Path) -> None:
    # a folder of its own for each: what was read is remembered by path, size and time
    message = file_fuzzing.read(known[name], files, folder / str(next(_numbers)))
    if message is not None:
        assert message.isprintable(), message
        assert 0 < len(message) < 3000


def test_what_is_whole_is_read(known: dict[str, Kind], folder: Path) -> None:
    for name, kind in known.items():
        assert file_fuzzing.read(kind, kind.files, folder / name) is None, name


def test_three_hundred_files(known: dict[str, Kind], folder: Path) -> None:
    @settings(QUIET, max_examples=300)
    @given(case=cases(known))
    def search(case: tuple[str, dict[str, bytes]]) -> None:
        check(known, *case, folder)

    search()


@pytest.mark.long
@pytest.mark.parametrize("shard", range(SHARDS))
def test_twenty_thousand_files(known: dict[str, Kind], folder: Path, shard: int) -> None:
    @seed(shard)
    @settings(QUIET, max_examples=CASES // SHARDS, derandomize=False)
    @given(case=cases(known))
    def search(case: tuple[str, dict[str, bytes]]) -> None:
        check(known, *case, folder)

    search()
