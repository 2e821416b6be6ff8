"""docs/papers.md says of every setting of the papers' studies what the source does, and stays in step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flatbench.config import study_files
from flatbench.config.yaml import parse

TEXT = (Path(__file__).parents[1] / "docs" / "papers.md").read_text(encoding="utf-8")
STUDIES = [n for n in study_files.predefined() if n.startswith("paper-") and not n.endswith("-small")]


def settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a study file by the name that the table gives it; measures and texts are none."""
    found: dict[str, Any] = {}
    for section in ("task", "model", "adapter", "train", "tune"):
        value = content.get(section, {})
        found |= (
            {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
        )
    found |= {f"grid.{key}": value for key, value in content.get("grid", {}).items()}
    methods = [m if isinstance(m, dict) else {"name": m} for m in content["methods"]]
    found["methods"] = [method["name"] for method in methods]
    for method in methods:
        if len(method) > 1:
            found[f"methods.{method['name']}"] = {k: v for k, v in method.items() if k != "name"}
    rest = ("name", "description", "variables", "methods", "measures", "grid", "task", "model", "adapter")
    found |= {k: v for k, v in content.items() if k not in (*rest, "train", "tune")}
    return found


def rows(study: str) -> dict[str, list[str]]:
    """Setting -> source, ours, why, of a study's table."""
    section = re.search(rf"^## {study}: .*?(?=^## |\Z)", TEXT, re.M | re.S)
    assert section, f"docs/papers.md has no section '## {study}: …'"
    found = {}
    for line in section[0].splitlines():
        if line.startswith("| `"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            name = cells[0].strip("`")
            assert name not in found
            found[name] = cells[1:]
    return found


@pytest.mark.parametrize("study", STUDIES)
def test_the_table_has_a_row_for_every_setting_and_its_value(study: str) -> None:
    content = parse(study_files.predefined()[study].read_text(encoding="utf-8"))
    expected, table = settings(content), rows(study)
    assert set(table) == set(expected)
    for name, (source, ours, why) in table.items():
        assert re.fullmatch(r"`.*`", ours), name
        assert parse(ours.strip("`")) == expected[name], name
        assert source, name
        assert source == "the same" or why, f"{study}: {name}: differs from its source without a reason"


def test_a_setting_that_drifts_is_noticed() -> None:
    """The comparison itself: a value changed, a setting added, a setting gone."""
    content = parse(study_files.predefined()["paper-glue"].read_text(encoding="utf-8"))
    table = {name: parse(ours.strip("`")) for name, (_, ours, _) in rows("paper-glue").items()}
    assert settings(content) == table
    for change in ({"seeds": [0]}, {"cost": "paired"}, {"train": {**content["train"], "warmup": 0.1}}):
        assert settings({**content, **change}) != table
    assert settings({**content, "train": {}}) != table
    assert settings({**content, "methods": content["methods"][:-1]}) != table


def test_no_study_claims_that_the_papers_settings_are_not_published() -> None:
    """They stand in tables that could not be read here."""
    for path in study_files.predefined().values():
        assert "not published" not in " ".join(path.read_text(encoding="utf-8").split())


@pytest.mark.parametrize("study", [s for s in STUDIES if "tune:" in study_files.predefined()[s].read_text()])
def test_the_radius_is_tried_constant_and_as_the_analysis_has_it(study: str) -> None:
    content = parse(study_files.predefined()[study].read_text(encoding="utf-8"))
    for method in content["methods"]:
        if isinstance(method, dict) and method["name"] in ("flat_lora", "eflat_lora"):
            assert method["grid"]["rho_schedule"] == ["constant", "inv_sqrt"]
            assert method["grid"]["rho"] == [0.05, 0.1, 0.2]
