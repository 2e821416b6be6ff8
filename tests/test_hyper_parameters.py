"""Hyper-parameters as text: readable numbers, and nothing of those without a value."""

from __future__ import annotations

from typing import Any

import pytest

from flatbench.config.hyper_parameters import hyper_text


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        (
            {"lr": 1e-3, "rho": float("nan"), "r": 8.0, "schedule": "cosine", "modules": ["q", "v"]},
            'lr 0.001, r 8, schedule cosine, modules ["q", "v"]',
        ),
        ({"rho": 0.1 + 0.2, "momentum": None, "nesterov": True}, "rho 0.3, nesterov True"),
        ({}, ""),
    ],
)
def test_hyper_parameters_as_text(choice: dict[str, Any], text: str) -> None:
    assert hyper_text(choice) == text
