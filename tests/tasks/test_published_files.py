"""Published data files: found plain or packed, read once a version, and refused with file and line."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from flatbench.errors import InputError
from flatbench.tasks.common.published_files import (
    find,
    folder_of,
    json_lines,
    read_bytes,
    read_json,
    read_once,
    read_text,
)


def test_a_folder_or_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of(str(tmp_path)) == folder_of("~") == tmp_path
    assert (
        folder_of(None) is folder_of("") is folder_of("owner/name") is folder_of("mnist", owner=False) is None
    )
    for name in ("mnist", "a/b/c", "/no/where", "./a", "~/no"):
        with pytest.raises(InputError, match=f"^data: no such folder: {name}$"):
            folder_of(name)


def test_a_file_is_found_plain_or_packed_in_the_order_of_its_names(tmp_path: Path) -> None:
    assert find(tmp_path, ["a", "b"]) is None
    for name in ("b", "b.gz", "a.gz"):
        (tmp_path / name).touch()
    assert find(tmp_path, ["a", "b"]) == tmp_path / "a.gz"
    assert find(tmp_path, ["b", "a"]) == tmp_path / "b"


def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    seen: list[str] = []

    @read_once(kept=2)
    def length(path: Path, unit: int) -> int:
        seen.append(path.name)
        return len(read_text(path)) // unit

    file = tmp_path / "a"
    file.write_text("four")
    assert [length(file, 1), length(file, 1), length(file, 2), length(file, 2)] == [4, 4, 2, 2]
    assert len(seen) == 2
    file.write_text("five!")
    assert length(file, 1) == 5
    os.utime(file, ns=(1, 1))
    assert length(file, 1) == 5
    assert len(seen) == 4
    with pytest.raises(InputError, match="no such file"):
        length(tmp_path / "b", 1)


def test_packed_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffgrün".encode())
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert read_text(tmp_path / "a") == read_text(tmp_path / "a.gz") == "grün"
    assert read_bytes(tmp_path / "a") == read_bytes(tmp_path / "a.gz")


@pytest.mark.parametrize(
    "damage", [b"", b"no gzip", gzip.compress(b"x" * 99, mtime=0)[:-9], b"\x1f\x8b\x08" + b"\0" * 30]
)
def test_damaged_archives(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "a.gz"
    file.write_bytes(damage)
    for read in (read_text, read_bytes):
        if damage:
            with pytest.raises(InputError, match="cannot be read"):
                read(file)
        else:
            assert not read(file)


def test_json_and_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "1\u2028"}\n\n{"a": 2}\n')
    assert list(json_lines(file)) == [(1, {"a": "1\u2028"}), (3, {"a": 2})]
    for text, message in (('{"a": 1}\n{', "line 2: not JSON"), ("[1]", "line 1: expected an object")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            list(json_lines(file))
    file.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_json(file)
    file.write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        read_json(file)
