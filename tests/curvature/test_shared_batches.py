"""Curvature over batches that processes share equals that over all of them in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flatbench.curvature import HessianOperator, over_processes
from flatbench.distributed import processes
from tests.curvature import shared_batches_cases as cases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes has found."""
    folder = tmp_path_factory.mktemp("group")
    processes.launch(cases.everything, folder, len(cases.PARTS))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(cases.PARTS))]


@pytest.fixture(scope="module")
def alone() -> Any:
    return cases.alone()


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "differences"])
def test_products_and_estimates_are_those_of_all_batches(
    found: list[dict[str, Any]], alone: Any, kind: str
) -> None:
    expected = getattr(alone, kind)
    close = {"rtol": 1e-5, "atol": 1e-6} if kind == "differences" else {"rtol": 1e-10, "atol": 1e-12}
    for own in (each[kind] for each in found):
        torch.testing.assert_close(own["products"], expected["products"], **close)
        torch.testing.assert_close(own["one"], expected["one"], **close)
        assert own["point"][0] == pytest.approx(expected["point"][0], rel=1e-12)
        torch.testing.assert_close(own["point"][1], expected["point"][1], rtol=1e-10, atol=1e-12)
        assert own["trace"] == pytest.approx(expected["trace"], rel=1e-5)
        torch.testing.assert_close(own["density"], expected["density"], rtol=1e-4, atol=1e-5)
        assert own["values"] == pytest.approx(expected["values"], rel=2e-3)


def test_two_close_outliers_of_shards_are_certified(found: list[dict[str, Any]]) -> None:
    for own in (each["planted"] for each in found):
        assert own.certified == (True, True)
        for i, true in enumerate((10.0, 9.9)):
            assert own.values[i] == pytest.approx(true, rel=1e-3)
            assert own.values[i] - own.errors[i] <= true <= own.upper_bounds[i]
    assert torch.equal(found[0]["planted"].vectors, found[2]["planted"].vectors)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("a batch", "InputError", "the model rejects a batch"),
        ("no mean", "InputError", "is not the mean over its rows"),
        ("its own", "InputError", "multiplied with this process's own operator"),
        ("no pickle", "InputError", "what compute returned cannot be sent"),
        ("weights", "InputError", "process 1 has other weights than process 0"),
        ("loss", "InputError", "process 1 has another loss"),
        ("no terms", "FlatbenchError", "the mean of no terms"),
    ],
)
def test_what_goes_wrong_in_one_process_is_raised_in_all(
    found: list[dict[str, Any]], case: str, kind: str, words: str
) -> None:
    for own in found:
        assert own["refused"][case][0] == kind
        assert words in own["refused"][case][1]


def test_an_error_of_another_process_names_it(found: list[dict[str, Any]]) -> None:
    assert "process 2" in found[0]["refused"]["a batch"][1]
    assert found[0]["refused"]["what raises"][0] == "ZeroDivisionError"
    kind, words = found[1]["refused"]["what raises"]
    assert (kind, words.partition(":")[0]) == ("FlatbenchError", "process 0")


def test_a_process_without_terms_counts_for_nothing(found: list[dict[str, Any]]) -> None:
    texts = cases.texts()
    alone = HessianOperator(cases.Words().double(), cases.loss, [texts[0], texts[2]])
    for (loss, gradient), product in (each["without terms"] for each in found):
        assert loss == pytest.approx(alone.point()[0], rel=1e-12)
        torch.testing.assert_close(gradient, alone.point()[1], rtol=1e-10, atol=1e-12)
        expected = alone @ torch.ones(alone.dimension).double()
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)


def test_after_errors_the_model_is_as_it_was_and_the_group_works(
    found: list[dict[str, Any]], alone: Any
) -> None:
    for own in found:
        assert own["unchanged"]
        torch.testing.assert_close(own["again"], alone.hessian["point"], rtol=1e-10, atol=1e-12)
    some = HessianOperator(cases.Words().double(), cases.loss, cases.texts()[1:])
    for own in found[1:]:
        torch.testing.assert_close(own["pair"], some.point(), rtol=1e-10, atol=1e-12)


def test_without_a_group_it_is_the_operator_itself() -> None:
    operator = HessianOperator(cases.Words().double(), cases.loss, cases.texts())
    assert over_processes(operator, lambda whole: whole) is operator
