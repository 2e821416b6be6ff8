"""Searches that take long: Ctrl-C keeps what was found, and the log tells how far they are."""

from __future__ import annotations

import logging

import pytest
from torch import Tensor

from flatbench.curvature import Interrupted, MatrixOperator, top_eigenpairs
from flatbench.curvature.eigenpairs import lanczos
from tests.curvature.curvature_cases import symmetric
from tests.curvature.test_lanczos import SPECTRA, bulk


def test_an_interrupt_keeps_what_converged() -> None:
    matrix, calls = symmetric(bulk(0, 10, 5)), 0

    def multiply(vector: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 15:
            raise KeyboardInterrupt
        return matrix @ vector

    with pytest.raises(Interrupted) as caught:
        top_eigenpairs(MatrixOperator(multiply, 300), 8)
    found = caught.value.found
    assert [round(value, 2) for value in found.values[:2]] == [10, 5]
    assert all(found.converged)
    assert 2 <= len(found.values) < 8
    assert found.vectors.shape == (300, len(found.values))


@pytest.mark.parametrize("certify", [True, False])
def test_a_long_search_tells_how_far_it_is(
    certify: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    operator = MatrixOperator(symmetric(SPECTRA["decaying"](0)))
    caplog.set_level(logging.INFO, logger="flatbench")
    top_eigenpairs(operator, 3, certify=certify)
    assert not caplog.messages  # it took no minute
    monkeypatch.setattr(lanczos, "TELL_SECONDS", 0.0)
    found = top_eigenpairs(operator, 3, certify=certify)
    first, last = caplog.messages[0], caplog.messages[-1]
    assert first.startswith("eigenvalues: 1 products in 0.0 min")
    assert f" {found.products} products" in last
    assert f"number 3 of 3 is {found.values[2]:.4g}, residual" in last
    assert ("bounds" in last) is certify
