"""Every method and measure has an entry, the page of documentation is made from them, and reports carry
them."""

from __future__ import annotations

from pathlib import Path

from flatbench import measures, optim
from flatbench.config.sections import ADAPTER_SHORTHANDS
from flatbench.report import open_results
from flatbench.report.text import glossary
from flatbench.study.methods import METHOD_SHORTHANDS

ROOT = Path(__file__).parents[2]


def test_every_method_adapter_and_measure_has_an_entry() -> None:
    assert set(glossary.METHODS) == {*METHOD_SHORTHANDS, *optim.REGISTRY.names(), *optim.ALIASES}
    assert set(glossary.ADAPTERS) == set(ADAPTER_SHORTHANDS)
    assert set(glossary.MEASURES) == set(measures.REGISTRY.names())


def test_the_documentation_is_made_from_it() -> None:
    assert (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8") == glossary.document()


def test_a_report_explains_its_own_methods_and_measures() -> None:
    found = glossary.entries(open_results(str(ROOT / "reports" / "fashion-vit")))
    assert found["Methods"]["lora"].startswith("LoRA")
    # methods with names of their own are explained by what they are made of
    assert found["Methods"]["full_sam"].startswith("Without an adapter. Optimizer sam")
    assert found["Methods"]["sgd"].startswith("Without an adapter. Optimizer plain over sgd")
    assert "msam" not in found["Methods"]
    assert set(found["Measures"]) >= {"hessian", "sam_sharpness"}
    assert "ema_gap" not in found["Measures"]


def test_every_method_of_the_committed_reports_is_explained() -> None:
    for path in (ROOT / "reports").glob("*/results.parquet"):
        results = open_results(str(path))
        assert set(glossary.entries(results)["Methods"]) == set(results.methods)
