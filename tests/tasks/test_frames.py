"""Users' tables hold what their files say, value for value, or are refused in a line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from flatbench.errors import InputError
from flatbench.store.files import read_parquet
from flatbench.tasks.common import published_files
from flatbench.tasks.common.frames import read_frame
from tests.forged import forge_pandas_metadata


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


REFUSED = {
    "more fields than the header": (
        "a.csv",
        "text,label\none,two,0\nthree,four,1\n",
        "line 2 has 3 fields, and the header 2",
    ),
    "one longer line": ("a.csv", "text,label\none,0\ntwo,three,1\n", "line 3 has 3 fields, and the header 2"),
    "fewer fields": ("a.csv", "text,label\none,0\ntwo\n", "line 3 has 1 fields, and the header 2"),
    "an index column without a name": ("a.tsv", "text\tlabel\n0\tone\t0\n1\ttwo\t1\n", "line 2 has 3 fields"),
    "two columns of one name": ("a.csv", "text,label,text\none,0,two\n", "two columns are called 'text'"),
    "no column": ("a.csv", "text,other\none,0\n", "label"),
    "only a header": ("a.csv", "text,label\n", "no rows"),
    "nothing": ("a.csv", "", "cannot be read"),
    "a quote that is not closed": ("a.csv", 'text,label\n"one,0\n', "unexpected end of data"),
    "deep JSON": ("a.jsonl", "[" * 100_000, "line 1: not JSON"),
    "JSON that is no object": ("a.jsonl", "[1, 2]\n", "line 1: expected an object"),
    "no parquet": ("a.parquet", b"PAR1 nothing PAR1", "cannot be read"),
    "no text": ("a.csv", b"text,label\n\xff\xfe,0\n", "not readable as UTF-8"),
    "no gzip": ("a.csv.gz", b"text,label\none,0\n", "cannot be read"),
    "another ending": ("a.xlsx", "", "expected a file ending in .csv, .tsv, .jsonl, .parquet"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[kind]
    with pytest.raises(InputError) as refused:
        read_frame("task.train", write(tmp_path, name, content), ["text", "label"])
    assert str(refused.value).startswith("task.train: ")
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.csv")
    with pytest.raises(InputError, match="no such file"):
        read_frame("task.train", str(tmp_path / "a.csv"), ["text"])


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_files, "EXPANDED_BYTES", 1 << 20)
    small = gzip.compress(b"text,label\n" + b"a,0\n" * 100)
    assert len(read_frame("train", write(tmp_path, "small.csv.gz", small), ["text"])) == 100
    with pytest.raises(InputError, match="unpacks to more than"):
        read_frame("train", write(tmp_path, "a.csv.gz", gzip.compress(bytes(2 << 20))), ["text"])
    with pytest.raises(InputError, match="unpacks to more than"):
        published_files.read_bytes(tmp_path / "a.csv.gz")


def test_a_parquet_file_is_no_bomb(tmp_path: Path) -> None:
    """A text that stands in many rows is in the file once."""
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 100_000]))
    table = pa.table({"text": repeated, "label": pa.array(["0", "1"] * 50_000)})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"its texts unpack to 9\.54e\+03 MiB"):
        read_frame("train", str(tmp_path / "a.parquet"), ["text", "label"])
    rows = pa.table({"text": pa.nulls(6_000_000), "label": pa.nulls(6_000_000)})
    parquet.write_table(rows, tmp_path / "b.parquet")
    with pytest.raises(InputError, match="more than 5,000,000 rows"):
        read_frame("train", str(tmp_path / "b.parquet"), ["text", "label"])


def test_lines_of_other_names_take_no_more_memory(tmp_path: Path) -> None:
    """A table of all their names would have a hundred million cells."""
    lines = (json.dumps({"text": "a", "label": 0, f"name {i}": i}) for i in range(10_000))
    found = read_frame("train", write(tmp_path, "a.jsonl", "\n".join(lines)), ["text", "label"])
    assert found.shape == (10_000, 2)
    with pytest.raises(InputError, match="no column 'score'; it has text, label, name 0"):
        read_frame("train", str(tmp_path / "a.jsonl"), ["text", "score"])


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published_files, "LONGEST_LINE", 1000)
    for name in ("a.csv", "a.jsonl", "a.csv.gz"):
        content = b"text,label\n" + b"x" * 2000
        path = write(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(InputError, match=r"more than 1000 characters in one line|not JSON"):
            read_frame("train", path, ["text", "label"])


def test_pandas_metadata_decide_nothing(tmp_path: Path) -> None:
    """Forged, they would give the columns each other's names."""
    table = pa.table({"text": ["one", "two"], "label": ["0", "1"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    forge_pandas_metadata(tmp_path / "a.parquet", "text", "label")
    found = read_frame("train", str(tmp_path / "a.parquet"), ["text", "label"])
    assert found["text"].tolist() == ["one", "two"]
    assert found["label"].tolist() == ["0", "1"]


def test_whole_numbers_stay_whole_beside_missing_ones(tmp_path: Path) -> None:
    pd.DataFrame({"text": ["a", "b"], "label": pd.array([1, None], dtype="Int64")}).to_parquet(
        tmp_path / "a.parquet"
    )
    found = read_frame("train", str(tmp_path / "a.parquet"), ["text", "label"])
    assert found["label"].tolist() == [1, None]


FIELDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS, FIELDS), min_size=1, max_size=6),
    kind=st.sampled_from(["csv", "tsv"]),
)
def test_every_value_is_what_was_written(
    rows: list[tuple[str, str, str]], kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the standard library's writer; texts that look like numbers, dates, or nothing stay texts."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter={"csv": ",", "tsv": "\t"}[kind], quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "pair", "label"), *rows])
    name = write(tmp_path_factory.mktemp("rows"), f"a.{kind}", text.getvalue())
    found = read_frame("train", name, ["text", "pair", "label"])
    assert [*found.itertuples(index=False, name=None)] == rows


def test_texts_that_are_no_utf8(tmp_path: Path) -> None:
    """pyarrow reads them, and raises UnicodeDecodeError for the one that is looked at."""
    raw = pa.array([b"a good one", b"\xe2zm"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet.*Invalid UTF8"):
        read_frame("train", str(tmp_path / "a.parquet"), ["text"])
    with pytest.raises(ValueError, match="Invalid UTF8"):
        read_parquet(tmp_path / "a.parquet")


def test_places_in_no_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = pa.DictionaryArray.from_arrays(pa.array([0, 7], pa.int32()), pa.array(["a"]), safe=False)
    parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet.ParquetFile, "read", lambda *_, **__: pa.table({"text": wrong}))
    with pytest.raises(InputError, match=r"a\.parquet.*out of bounds"):
        read_frame("train", str(tmp_path / "a.parquet"), ["text"])
