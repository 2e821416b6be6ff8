"""Files are whole or not there, and a disk that refuses is named in one line."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from flatbench.errors import FlatbenchError, InputError
from flatbench.store import StudyFolder, files


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"new": float("nan")})
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["file.json"]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
        (errno.EIO, "some error"),
    ],
)
def test_a_disk_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, "some error")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(FlatbenchError, match=expected):
        files.write_json(tmp_path / "x.json", {})
    assert not list(tmp_path.iterdir())


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="a file is where a folder should be"):
        StudyFolder(tmp_path / "out", "s").prepare()
    with pytest.raises(InputError, match="a file is where a folder should be"):
        files.write_json(tmp_path / "out" / "x.json", {})


def test_a_known_digest_follows_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    digests = []
    for content in (b"one", b"three"):
        path.write_bytes(content)
        digests.append(files.known_digest(path))
        assert files.known_digest(path) == files.file_digest(path) == hashlib.sha256(content).hexdigest()
    path.write_bytes(b"seven")  # as long as before, and perhaps within one tick of the file system's clock
    os.utime(path, ns=(1, 1))
    assert files.known_digest(path) == files.file_digest(path) not in digests
