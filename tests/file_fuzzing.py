"""Ways to damage the files that flatbench reads, and limits within which they are read."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import os
import resource
import shutil
import signal
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from hypothesis import strategies as st

from flatbench.errors import FlatbenchError
from tests.file_kinds import Kind
from tests.fuzzing import HOSTILE, SNIPPETS, places

#: bytes that reading may take beside what the process has already, and seconds of processor time
MEMORY, SECONDS = 2 << 30, 10


# -- ways to damage ---------------------------------------------------------------------------------------

_NUMBERS = [struct.pack(form, n) for form in ("<i", ">i", "<q") for n in (-1, 0, 2**31 - 1, 2**16, -(2**31))]
_DEEP = (b"[" * 100_000, b'{"a":' * 100_000)


@st.composite
def cases(draw: st.DrawFn, known: dict[str, Kind]) -> tuple[str, dict[str, bytes]]:
    """The name of a kind, and its files with one of them, sometimes two, damaged."""
    name = draw(st.sampled_from(sorted(known)))
    files = dict(known[name].files)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        target = draw(st.sampled_from(known[name].targets))
        if target not in files:
            continue
        content = files[target]
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            content = _damaged(draw, target, content)
        files[target] = content
        if draw(st.integers(0, 30)) == 0:
            del files[target]
    return name, files


def _damaged(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    ways: list[Callable[[st.DrawFn, bytes], bytes]] = [_garbled]
    if name.endswith(".gz"):
        ways.append(lambda draw, packed: _repacked(draw, packed, name.removesuffix(".gz")))
    if name.endswith((".json", ".jsonl")):
        ways += [_structure] * 3
    if name.endswith((".csv", ".tsv", ".jsonl", ".txt", ".label", ".yaml", ".json")):
        ways += [_text] * 2
    if name.endswith(".safetensors"):
        ways += [_header] * 2
    return draw(st.sampled_from(ways))(draw, content)


def _repacked(draw: st.DrawFn, packed: bytes, name: str) -> bytes:
    try:
        return gzip.compress(_damaged(draw, name, gzip.decompress(packed)), 1)
    except (OSError, EOFError, zlib.error):
        return packed


def _garbled(draw: st.DrawFn, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content)))
    way = draw(st.sampled_from(["cut", "flip", "number", "insert", "drop", "double", "zeros", "anything"]))
    if way == "cut":
        return content[:at]
    if way == "flip":
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :] \
            if at < len(content) else content + b"\0"  # fmt: skip
    if way == "number":
        number = draw(st.sampled_from(_NUMBERS))
        return content[:at] + number + content[at + len(number) :]
    if way == "insert":
        return content[:at] + draw(st.binary(max_size=40)) + content[at:]
    if way == "drop":
        return content[:at] + content[at + draw(st.integers(1, 64)) :]
    if way == "double":
        return content[:at] * 2 + content[at:]
    return bytes(len(content)) if way == "zeros" else draw(st.binary(max_size=200))


def _text(draw: st.DrawFn, content: bytes) -> bytes:
    pieces = [piece.encode("utf-8", "surrogatepass") for piece in SNIPPETS]
    own = [
        b'"',
        b",",
        b"\t",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"\x1b[2J",
        "\u202e".encode(),
        *_DEEP,
        b"1" * 5000,
    ]
    way = draw(st.sampled_from(["insert", "insert", "line", "swap"]))
    lines = content.split(b"\n")
    at = draw(st.integers(0, len(lines) - 1))
    if way == "insert":
        place = draw(st.integers(0, len(content)))
        return content[:place] + draw(st.sampled_from([*own, *pieces])) + content[place:]
    if way == "line":
        return b"\n".join([*lines[:at], draw(st.sampled_from([*own, *pieces])), *lines[at + 1 :]])
    return b"\n".join([*lines[at:], *lines[:at]])


def _structure(draw: st.DrawFn, content: bytes) -> bytes:
    """Another value at some place of a JSON text, or of one of its lines."""
    lines = content.split(b"\n") if content.startswith(b"{") and content.count(b"\n{") else [content]
    at = draw(st.integers(0, len(lines) - 1))
    try:
        node = json.loads(lines[at])
        found = list(places(node))
    except (ValueError, RecursionError):
        return content
    value = copy.deepcopy(draw(st.sampled_from(HOSTILE) | st.text(max_size=8) | st.integers() | st.floats()))
    if not found:
        node = value
    else:
        *above, key = draw(st.sampled_from(found))
        inner = node
        for step in above:
            inner = inner[step]
        way = draw(st.sampled_from(["replace", "replace", "delete", "rename", "double"]))
        if way == "delete":
            del inner[key]
        elif way == "rename" and isinstance(inner, dict):
            inner[str(value)[:100]] = inner.pop(key)
        elif way == "double" and isinstance(inner, list):
            inner.insert(key, copy.deepcopy(inner[key]))
        else:
            inner[key] = value
    try:
        lines[at] = json.dumps(node).encode()
    except (TypeError, ValueError):
        return content
    return b"\n".join(lines)


def _header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header of the right length."""
    size = int.from_bytes(content[:8], "little")
    if size > len(content):
        return content
    header = _structure(draw, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


# -- limits -----------------------------------------------------------------------------------------------


class TooSlowError(BaseException):
    """Reading took longer than it may; no reader catches it."""


def _too_slow(*_: object) -> None:
    raise TooSlowError(f"more than {SECONDS} s of processor time")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Within it, more than `MEMORY` raises MemoryError and more than `SECONDS` raises `TooSlowError`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, before[1]))
    handler = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Files of a folder that is not there yet."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(kind: Kind, files: dict[str, bytes], folder: Path) -> str | None:
    """Read a folder of such files within the limits; the message if it is refused."""
    write(folder, files)
    try:
        with limited():
            kind.read(folder)
        return None
    except FlatbenchError as error:
        return str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
