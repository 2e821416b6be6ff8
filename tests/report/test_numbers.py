"""Reports write the same numbers whatever vector instructions a processor has."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flatbench.report import open_results
from flatbench.report.analysis.inference import judge
from flatbench.report.document import all_tables
from flatbench.report.numbers import fixed, rounded, rounded_frame, significant
from flatbench.report.tables.render import to_csv, to_markdown
from flatbench.report.text.findings import findings

ROOT = Path(__file__).parents[2]
FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(FINITE)
def test_twelve_digits_are_kept_and_rounding_again_changes_nothing(value: float) -> None:
    found = rounded(value)
    assert found == pytest.approx(value, rel=1e-11, abs=5e-324)
    assert rounded(found) == found
    assert math.copysign(1, rounded(-0.0)) == 1


def test_other_orders_of_a_sum_are_written_alike() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(1, 0.1, size=501)
    sums = {float(sum(rng.permutation(values).tolist())) for _ in range(50)}
    assert len(sums) > 1
    assert len({rounded(s) for s in sums}) == 1


def test_what_cancels_is_zero_and_what_does_not_keeps_the_digits_that_it_has() -> None:
    assert rounded(0.1 + 0.2 - 0.3) != 0
    assert rounded(0.1 + 0.2 - 0.3, scale=0.3) == 0
    assert rounded((1e6 + 0.125 + 1e-9) - 1e6, scale=1e6) == 0.125
    # three equal differences have no spread, whichever way their mean was rounded
    (found,) = judge([[0.1, 0.1, 0.1]])
    assert (found.interval.estimate, found.spread) == (0.1, 0)
    (found,) = judge([[0.1, 0.2, -0.3]])
    assert not found.differs
    assert found.interval.estimate == 0


def test_half_a_digit_is_rounded_one_way() -> None:
    below, above = 0.7235 * 100, (0.7205 + 0.7265) / 2 * 100
    assert fixed(np.nextafter(below, 0), 1) == fixed(np.nextafter(above, 100), 1)
    assert significant(np.nextafter(0.00125, 0), 2) == significant(np.nextafter(0.00125, 1), 2)
    assert fixed(2.5, 2, sign=True) == "+2.50"


def test_tables_of_mixed_columns() -> None:
    noisy = 0.1 + 0.2
    table = pd.DataFrame(
        {"text": ["a", "b"], "count": [1, 2], "part": [noisy, math.nan], "mixed": [noisy, "x"]}
    )
    found = rounded_frame(table)
    assert found["part"][0] == found["mixed"][0] == 0.3
    assert math.isnan(found["part"][1])
    assert [found["text"][1], found["count"][1], found["mixed"][1]] == ["b", 2, "x"]


def digest(report: str) -> str:
    """Of every table and every sentence that a report would write."""
    results = open_results(str(ROOT / "reports" / report))
    tables = all_tables(results)
    texts = [*map(to_csv, tables), *map(to_markdown, tables), *findings(results)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def vector_instructions() -> list[str]:
    """Those that numpy would use here beyond what it always needs."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return [name for name in __cpu_dispatch__ if __cpu_features__[name]]


@pytest.mark.slow
def test_a_report_is_the_same_without_vector_instructions() -> None:
    names = vector_instructions()
    if not names:
        pytest.skip("numpy finds no vector instructions here that could be left out")
    code = "from tests.report.test_numbers import digest; print(digest('quickstart'))"
    plain = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(names), "OPENBLAS_CORETYPE": "Nehalem"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [digest("quickstart")]
