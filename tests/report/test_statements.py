"""A test for each kind of sentence: synthetic studies whose truth is known, and what may be said of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flatbench.report import Results
from flatbench.report.analysis.differences import ALL, differences
from flatbench.report.text.answer import answer, reservations
from flatbench.report.text.findings import findings_json
from flatbench.report.text.remarks import notes
from flatbench.report.text.sentences import sentence, with_interval
from flatbench.report.text.statement import Statement
from flatbench.report.text.statements import statements
from tests.report.synthetic import plain, results

SIX = [f"m{i}" for i in range(6)]


def study(effect: float = 0.0, spread: float = 0.02) -> Any:
    """sam differs from lora by ``effect``, its eigenvalue by the factor e^(−10·effect); else luck alone."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([seed, len(method), len(condition)])
        shared = np.random.default_rng(seed).normal(0, 0.05)
        own = effect if method == "sam" else 0.0
        return {
            **plain(method, condition, seed, choice),
            "test": float(0.7 + shared + own + rng.normal(0, spread)),
            "train": 0.9,
            "sharpness": float(1 - own + rng.normal(0, spread)),
            "eigenvalue": float(np.exp(3 - 10 * own + rng.normal(0, 10 * spread))),
        }

    return outcomes


def grid(within: float, between: float) -> Any:
    """Test metric and eigenvalue of six methods: slope within methods and slope between them."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([int(method[1:]), int(1e4 * choice["lr"]), seed])
        place, moved = 2.0 * int(method[1:]), float(np.log10(choice["lr"]))
        value = 20 + place + moved + 0.05 * rng.normal()
        test = 0.5 + 0.01 * (between * place + within * moved) + 0.0005 * rng.normal()
        return {
            **plain(method, condition, seed, choice),
            "eigenvalue": value,
            "sharpness": value,
            "test": test,
        }

    return outcomes


def of(data: Results, kind: str, column: str = "", condition: str | None = None) -> list[Statement]:
    return [
        s
        for s in statements(data)
        if s.kind == kind
        and (not column or s.details["column"] == column)
        and (condition is None or s.condition == condition)
    ]


def texts(data: Results) -> str:
    return "\n".join([*answer(data), *map(sentence, statements(data))])


def consistent(data: Results) -> None:
    """No sentence contradicts itself or its numbers; no claim without an interval that leaves out nothing."""
    for one in statements(data):
        if one.kind == "difference":
            zero = 1.0 if one.scale == "ratio" else 0.0
            apart = one.low is not None and one.high is not None and not one.low <= zero <= one.high
            assert apart == (one.details["p"] is not None and one.details["p"] < 0.05)
            assert bool(one.claim) <= apart
            said = sentence(one)
            if "not distinguishable" in said:
                assert not apart
                assert "at 80 % power" in said
            if "leaves out" in said:
                assert apart
        if one.kind == "relation" and one.claim:
            assert one.low is not None
            assert one.high is not None
            assert one.low * one.high > 0
    for found in re.findall(r"excludes zero.*?p 1\b|nan|None|inf\b", texts(data)):
        raise AssertionError(found)


def test_null(tmp_path: Path) -> None:
    data = results(tmp_path, study(), methods=("lora", "sam", "flat_lora"), seeds=range(5))
    assert not any(s.claim for s in of(data, "difference"))
    first = answer(data)[0]
    assert "No method is distinguishable from lora" in first
    assert re.search(
        r"at 80 % power this design shows a difference of [\d.]+ .*or more; 1 point takes \d+", first
    )
    consistent(data)


def test_effect(tmp_path: Path) -> None:
    data = results(tmp_path, study(0.1, 0.005), methods=("lora", "sam", "flat_lora"), seeds=range(5))
    (test,) = [s for s in of(data, "difference", "test") if s.subject == "sam"]
    assert test.claim == "differs from lora"
    assert test.low is not None
    assert test.low < 0.1 < (test.high or 0)
    (flat,) = [s for s in of(data, "difference", "hessian_merged.eigenvalue_1") if s.subject == "sam"]
    assert flat.scale == "ratio"
    assert flat.low is not None
    assert flat.low < np.exp(-1) < (flat.high or 0) < 1
    assert "sam is above lora" in answer(data)[0]
    assert "sam is flatter than lora" in answer(data)[1]
    assert not any(s.claim for s in of(data, "difference") if s.subject == "flat_lora")
    assert of(data, "highest")[0].subject == of(data, "flattest")[0].subject == "sam"
    consistent(data)


def test_further_comparisons_claim_nothing(tmp_path: Path) -> None:
    """They have intervals, but are not among the comparisons that the error rate is kept for."""
    data = results(tmp_path, study(0.1, 0.005), conditions=("a", "bb"), seeds=range(5))
    assert {s.condition for s in of(data, "difference") if s.claim} == {ALL}
    further = of(data, "difference", "test", "a")
    assert further
    assert "secondary comparison" in sentence(further[0])
    consistent(data)


def test_one_seed(tmp_path: Path) -> None:
    data = results(tmp_path, study(0.2), seeds=(0,))
    assert not any(s.claim or s.low for s in of(data, "difference"))
    assert "No difference to lora has an interval (one seed), so that none is claimed." in answer(data)[0]
    assert reservations(data)[0].startswith("One seed")
    consistent(data)


def test_three_seeds_say_that_the_exact_test_has_no_say(tmp_path: Path) -> None:
    data = results(tmp_path, study(0.1, 0.003))
    assert all(not s.details["exact"] for s in of(data, "difference"))
    assert reservations(data)[0].startswith("3 seeds, too few for an exact test")


def test_a_diverged_baseline(tmp_path: Path) -> None:
    def outcomes(method: str, *rest: Any) -> Any:
        lost = {"state": "diverged", "error": "nan", "validation": 0.5}
        return lost if method == "lora" and rest[1] != 100 else study()(method, *rest)

    data = results(tmp_path, outcomes, methods=("lora", "sam", "flat_lora"))
    assert of(data, "difference") == []
    assert any("3 diverged" in text for text in reservations(data))
    assert "lora" not in answer(data)[0].partition(".")[0]
    consistent(data)


def test_what_has_no_interval_is_not_said_to_have_one(tmp_path: Path) -> None:
    """Two of three seeds are lost, so that one pair is left."""

    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        lost = {"state": "diverged", "error": "nan", "validation": 0.5}
        return lost if method == "sam" and seed in (1, 2) else study()(method, condition, seed, choice)

    data = results(tmp_path, outcomes, seeds=range(3))
    assert "has an interval" in answer(data)[0]
    assert not any("intervals above" in text for text in reservations(data))


def test_nan_in_some_runs(tmp_path: Path) -> None:
    def outcomes(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> Any:
        found = study()(method, condition, seed, choice)
        broken = method == "sam" and seed == 1
        return found | ({"skip": {"hessian_merged": "not finite"}} if broken else {})

    data = results(tmp_path, outcomes, seeds=range(4))
    (flat,) = of(data, "difference", "hessian_merged.eigenvalue_1")
    assert flat.n == 3
    assert "3 of the study's 4 seeds have both values" in flat.reservations
    assert of(data, "difference", "test")[0].n == 4
    consistent(data)


def test_a_constant_measure(tmp_path: Path) -> None:
    def outcomes(*labels: Any) -> Any:
        return study()(*labels) | {"eigenvalue": 5.0, "sharpness": 2.0}

    data = results(tmp_path, outcomes)
    (flat,) = of(data, "difference", "hessian_merged.eigenvalue_1")
    assert (flat.estimate, flat.low, flat.high, flat.claim) == (1, 1, 1, "")
    assert "equal in every pair of runs" in sentence(flat)
    consistent(data)


def test_negative_eigenvalues_have_no_ratio(tmp_path: Path) -> None:
    def outcomes(method: str, *rest: Any) -> Any:
        found = study()(method, *rest)
        return found | {"eigenvalue": found["eigenvalue"] - 20}

    data = results(tmp_path, outcomes)
    assert of(data, "difference", "hessian_merged.eigenvalue_1")[0].scale == "difference"
    consistent(data)


def test_simpson(tmp_path: Path) -> None:
    data = results(tmp_path, grid(-1.0, 1.0), methods=SIX, tuned=False)
    (one,) = [s for s in of(data, "relation", "hessian_merged.eigenvalue_1") if s.quantity == "test metric"]
    assert one.details["verdict"] == "between methods"
    assert one.claim == ""
    said = sentence(one)
    assert re.search(r"across methods \+0\.\d+.*within methods -\d\.\d+", said)
    assert "comes from differences between methods" in said
    assert "sharper minima go" not in texts(data)
    consistent(data)


@pytest.mark.parametrize(("slope", "word"), [(1.0, "higher"), (-1.0, "lower")])
def test_levels_that_agree(tmp_path: Path, slope: float, word: str) -> None:
    data = results(tmp_path, grid(slope, slope), methods=SIX, tuned=False)
    (one,) = [s for s in of(data, "relation", "hessian_merged.eigenvalue_1") if s.quantity == "test metric"]
    assert one.claim == f"sharper minima go with a {word} test metric"
    assert f"sharper minima go with a {word} test metric" in answer(data)[2]
    consistent(data)


def test_nothing_selected_compares_nothing_selected(tmp_path: Path) -> None:
    """A method's value is the mean over its grid, not its configuration that is best on the final seeds."""
    data = results(tmp_path, study(), tuned=False, seeds=range(4))
    frame = differences(data)
    final = data.final
    means = final.groupby(["method", "seed"])["test"].mean()
    row = frame[frame["quantity"] == "test"].iloc[0]
    assert row["estimate"] == pytest.approx((means["sam"] - means["lora"]).mean())
    assert any("Nothing was selected" in text for text in reservations(data))


def test_one_configuration_a_method_has_no_relation(tmp_path: Path) -> None:
    data = results(tmp_path, study())
    assert all(s.claim == "" and s.details["verdict"] == "none" for s in of(data, "relation"))
    assert "no relation is claimed" in answer(data)[2]


def test_nothing_final(tmp_path: Path) -> None:
    assert answer(results(tmp_path, lambda *_: None)) == ["No final run has a test metric yet."]


def test_findings_are_data_and_their_texts(tmp_path: Path) -> None:
    data = results(tmp_path, study(0.1, 0.005), seeds=range(5))
    found = json.loads(findings_json(data))
    assert found["answer"] == answer(data)
    assert len(found["statements"]) == len(statements(data))
    for entry, one in zip(found["statements"], statements(data), strict=True):
        assert {"claim", "estimate", "low", "high", "n", "basis", "reservations", "text"} <= set(entry)
        assert entry["text"] == sentence(one)


def test_a_study_without_lora_is_compared_with_its_first_method(tmp_path: Path) -> None:
    def outcomes(method: str, *rest: Any) -> Any:
        return study()("sam" if method == "full_sam" else "lora", *rest)

    data = results(tmp_path, outcomes, methods=("sgd", "full_sam"))
    assert of(data, "difference", "test")[0].details["reference"] == "sgd"


def test_measures_that_disagree_are_told_beside_the_answer(tmp_path: Path) -> None:
    """A method that is flatter by one measure and sharper by another is not just the flattest."""

    def opposite(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        values = study(0.1, 0.005)(method, condition, seed, choice)
        if method == "sam":
            values["sharpness"] += 5
        return values

    agree = results(tmp_path / "agree", study(0.1, 0.005), seeds=range(5))
    assert not any("disagree" in text for text in reservations(agree))
    differ = results(tmp_path / "differ", opposite, seeds=range(5))
    (text,) = [text for text in reservations(differ) if "disagree" in text]
    assert "flatter than lora by largest Hessian eigenvalue" in text
    assert "sharper than lora (SAM sharpness" in text
    consistent(differ)


def test_an_interval_that_excludes_one_does_not_read_one(tmp_path: Path) -> None:
    data = results(tmp_path, study(0.1, 0.005), seeds=range(5))
    (flat,) = [s for s in of(data, "difference", "hessian_merged.eigenvalue_1") if s.subject == "sam"]
    near = replace(flat, estimate=1.15, low=1.004, high=1.3)
    assert with_interval(near) == "× 1.1 [1.004, 1.3]"
    assert with_interval(replace(near, low=0.996)) == "× 1.1 [1, 1.3]"


def test_nothing_lost_is_said(tmp_path: Path) -> None:
    whole = results(tmp_path, study(0.1, 0.005), seeds=range(5))
    assert any(re.match(r"All \d+ runs finished; none diverged or failed", text) for text in notes(whole))


def test_a_measure_known_from_few_examples_is_said(tmp_path: Path) -> None:
    """How many runs' eigenvalues are uncertain by the choice of examples, and by how much."""

    def sampled(method: str, condition: str, seed: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        values = study(0.1, 0.005)(method, condition, seed, choice)
        share = 0.5 if method == "sam" else 0.1
        return {**values, "sampling_error_1": share * values["eigenvalue"], "resolved": share < 0.2}

    data = results(tmp_path, sampled, methods=("lora", "sam"), seeds=range(5))
    (text,) = [text for text in reservations(data) if "sample of the training data" in text]
    assert "of 5 of 10 runs is uncertain by more than 20 %" in text
    assert "median ± 30 %" in text
