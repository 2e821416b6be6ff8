"""What other libraries would say of flatbench's own calls is not said, and what they say of others' is."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flatbench.config.sections import AdapterOptions
from flatbench.models.adapt import adapt
from flatbench.models.factors import lora_factors
from tests import shared_cases


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "wte"], ["c_attn", "lm_head"]])
def test_adapting_gpt2_says_nothing(targets: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flatbench")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = adapt(shared_cases.gpt2(), AdapterOptions(r=2), targets, [])
        assert len(lora_factors(model)) == len(targets)
    assert [str(one.message) for one in said] == []
    # a tied head is named, in a line of flatbench's own
    assert any("used twice" in text for text in caplog.messages) is ("lm_head" in targets)
    kinds = {name: m.fan_in_fan_out for name, m in model.named_modules() if hasattr(m, "fan_in_fan_out")}
    assert all(
        transposed is name.endswith("c_attn") for name, transposed in kinds.items() if "wte" not in name
    )


def test_factors_that_are_shapes_alone_have_no_memory() -> None:
    model = adapt(shared_cases.bert(), AdapterOptions(r=2), ["query", "value"], [])
    mode = FakeTensorMode()
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad))
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("error")
        assert len(lora_factors(model)) == 2


def test_what_else_is_said_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    def speak(model: torch.nn.Module, config: object) -> torch.nn.Module:
        warnings.warn("something new", UserWarning, stacklevel=1)
        return model

    monkeypatch.setattr(peft, "get_peft_model", speak)
    with pytest.warns(UserWarning, match="something new"):
        adapt(shared_cases.gpt2(), AdapterOptions(r=2), ["c_attn"], [])
