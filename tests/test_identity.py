"""A run keeps its id when options are added that it does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd

from flatbench import store, study
from flatbench.config.registry import LATER, Options
from flatbench.study import plan

ROOT = Path(__file__).parents[1]


class Section(Options):
    rate: float = 0.5
    grouped: Annotated[bool, LATER] = False


def test_a_later_option_is_written_down_only_where_it_is_used() -> None:
    assert Section().model_dump(mode="json") == {"rate": 0.5}
    assert Section(grouped=True).model_dump(mode="json") == {"rate": 0.5, "grouped": True}
    assert Section.model_validate(Section().model_dump()) == Section()


def test_the_quickstarts_runs_have_the_ids_under_which_its_report_was_made(tmp_path: Path) -> None:
    reported = pd.read_parquet(ROOT / "reports" / "quickstart" / "results.parquet")
    planned = plan.Plan(study.load("quickstart"), store.StudyFolder(tmp_path, "quickstart"))
    tuning = {run.id for run in planned.tuning}
    assert tuning
    assert tuning == set(reported.loc[reported["stage"] == "tune", "run"])
