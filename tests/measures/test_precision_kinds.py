"""Every kind of adapter over half a base: in float32 the model with the same numbers, or refused alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flatbench.curvature.operators import precision
from flatbench.errors import NotApplicableError
from flatbench.models.factors import adapted_modules
from flatbench.subject.objective import Objective, norm
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.adapter_kinds import KINDS, loss, make
from tests.measures.measure_cases import same
from tests.measures.test_adapter_kinds import bits


def subject(name: str, kind: torch.dtype) -> Subject:
    """Numbers of few bits, all in one type but for the adapters, which are float32."""
    model, batch = make(name)
    model.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16)
    for key, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if "lora" in key else kind)
        parameter.grad = None
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(kind)
    rows = {k: v.bfloat16().to(kind) if v.is_floating_point() else v for k, v in batch.items()}
    return Subject(model, [rows], loss, adapted_modules(model, []), seed=0)


def looked_at(given: Subject, space: Any) -> tuple[float, float] | str:
    try:
        with in_space(given, space) as point:
            value, gradient = Objective(given, point, None).gradient()
            return value, norm(gradient)
    except NotApplicableError as reason:
        return str(reason).partition(":")[0]


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["copies", "layer by layer"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter(name: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SHARE", share)
    for space in ("adapter", "merged", "all"):
        expected = looked_at(subject(name, torch.float32), space)
        given = subject(name, torch.bfloat16)
        before: dict[str, Any] = bits(given.model)
        found = looked_at(given, space)
        assert same(bits(given.model), before), space
        if isinstance(expected, str):
            assert isinstance(found, str), (space, expected, found)
        else:
            assert found == pytest.approx(expected, rel=1e-5), space
        assert {p.dtype for p in given.model.parameters()} <= {torch.bfloat16, torch.float32}
