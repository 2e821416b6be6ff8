"""Results travel as parquet: the report made from them again is equal to the byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from flatbench import cli
from flatbench.errors import InputError
from flatbench.report import Results, open_results, write_report
from flatbench.report.analysis import archive
from tests.forged import forge_pandas_metadata
from tests.report.synthetic import make, plain
from tests.report.test_document import contents

MEASURES = (
    "hessian_merged",
    "sam_sharpness_merged",
    "slice_merged",
    "spectrum_merged",
    "balancedness",
    "cost",
)


def ragged(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
    """Some runs failed, some are missing, some skip a measure."""
    if method == "sam" and seed == 1:
        return {"state": "diverged", "error": "DivergedError: the loss is nan"}
    if method == "sam" and seed == 2:
        return None
    return plain(method, condition, seed, choice) | {
        "skip": {"balancedness": "no adapter"} if seed == 0 else {}
    }


def missing(value: Any) -> bool:
    return value is None or value != value


@pytest.mark.slow
def test_a_report_from_the_parquet_is_the_report(tmp_path: Path) -> None:
    folder = make(tmp_path / "results", ragged, conditions=("noise=0.0", "noise=0.2"), measures=MEASURES)
    made = write_report(Results.load(folder), tmp_path / "first", html=True)
    assert {"results.parquet", "history.parquet", "slices.parquet", "spectra.parquet"} <= set(made.files)
    for source in ("first", "first/results.parquet"):
        write_report(open_results(str(tmp_path / source)), tmp_path / "again", html=True)
        assert contents(tmp_path / "again") == contents(tmp_path / "first")


def test_values_of_many_kinds_come_back(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "mixed": pd.Series([1, "a", [1, 2], {"b": None}, None], dtype=object),
            "text": pd.Series(["x", None, "y", "z", "w"], dtype=object),
            "truth": pd.Series([True, None, False, True, None], dtype=object),
            "whole": [1, 2, 3, 4, 5],
            "part": [0.1, float("nan"), 1e300, -0.0, 5e-324],
        }
    )
    empty = pd.DataFrame()
    lists: dict[str, Any] = {"methods": [], "conditions": [], "seeds": [], "selection": [], "runs": []}
    content = {"study": {"name": "x"}, "budget": {}, **lists}
    given = Results(table, empty, empty, empty, content, [{"cores": 2, "runs": ["a"]}])
    assert archive.save(given, tmp_path) == ["results.parquet"]
    found = archive.load(tmp_path)
    assert found.content == given.content
    assert found.environments == given.environments
    assert found.history.empty
    for column in table:
        pairs = zip(found.table[column].tolist(), table[column].tolist(), strict=True)
        same = [(missing(a) and missing(b)) or (a == b and type(a) is type(b)) for a, b in pairs]
        assert all(same), column


@pytest.mark.slow
def test_the_command_line_takes_a_parquet_file(tmp_path: Path) -> None:
    write_report(Results.load(make(tmp_path / "results")), tmp_path / "first")
    ran = CliRunner().invoke(
        cli.app, ["report", str(tmp_path / "first/results.parquet"), "--output", str(tmp_path / "again")]
    )
    assert ran.exit_code == 0, ran.output
    assert contents(tmp_path / "again/demo") == contents(tmp_path / "first")


@pytest.mark.slow
def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_report(Results.load(make(tmp_path / "results")), tmp_path / "first")
    whole = tmp_path / "first/results.parquet"
    with pytest.raises(InputError, match=r"gone\.parquet: no such file"):
        open_results(str(tmp_path / "gone.parquet"))
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other\.parquet: not a results\.parquet of flatbench"):
        open_results(str(tmp_path / "other.parquet"))
    shutil.copy(whole, tmp_path / "alone.parquet")
    with pytest.raises(InputError, match=r"history\.parquet: no such file"):
        open_results(str(tmp_path / "alone.parquet"))
    (tmp_path / "first/history.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"history\.parquet: damaged"):
        open_results(str(whole))
    import pyarrow.parquet as parquet

    table = parquet.read_table(whole)
    later = json.dumps({"format": 99}).encode()
    parquet.write_table(table.replace_schema_metadata({b"flatbench": later}), tmp_path / "later.parquet")
    with pytest.raises(InputError, match="written in format 99"):
        open_results(str(tmp_path / "later.parquet"))


def test_pandas_metadata_decide_nothing(tmp_path: Path) -> None:
    """Forged, they would give one metric the values of the other."""
    folder = make(tmp_path / "results", plain, measures=("hessian_merged",))
    archive.save(Results.load(folder), tmp_path)
    file = tmp_path / archive.NAME
    before = open_results(str(file)).table
    forge_pandas_metadata(file, "validation.accuracy", "test.accuracy")
    assert "test.accuracy" not in pd.read_parquet(file)  # under its own name
    pd.testing.assert_frame_equal(open_results(str(file)).table, before)


def test_every_parquet_file_is_read_by_its_schema() -> None:
    """By `read_parquet` of the store, or with pandas' metadata ignored."""
    for path in Path(archive.__file__).parents[2].rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "pd.read_parquet" not in text, path
        assert not re.search(r"to_pandas\((?!ignore_metadata=True)", text), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": None}, "methods: "),
        ({"methods": ["lora", "asam"]}, "budget say nothing of 'asam'"),
        ({"seeds": [True]}, r"seeds\.0: "),
        ({"study": {}}, r"study\.name: field required"),
        ({"selection": [{}]}, r"selection\.0\."),
        ({"conditions": ["a"], "tasks": {"": {}}}, "tasks say nothing of 'a'"),
    ],
)
def test_a_list_of_runs_without_a_checksum_is_looked_at(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Earlier versions wrote none, so that anything could stand in it."""
    folder = make(tmp_path / "results")
    content = folder.read()
    folder.file.write_text(json.dumps({**content, **change}))
    with pytest.raises(InputError, match=rf"damaged \({message}"):
        Results.load(folder)
    folder.file.write_text(json.dumps(content))
    assert Results.load(folder).name == content["study"]["name"]
