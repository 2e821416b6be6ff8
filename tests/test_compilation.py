"""A compiled training is the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from flatbench.errors import InputError
from flatbench.runs.finish import finish
from flatbench.store import RunDirectory
from flatbench.training.compilation import CompiledForward
from tests.test_batching import finished, text_study
from tests.test_runner import METHODS, Killed, kill_at_replacement, prepared

pytestmark = pytest.mark.slow


__all__ = ["kill_at_replacement"]

TESTED = ["lora", "sam", "flat_lora", "eflat_lora"]
SHORT = ["eflat_lora"]  # a second point, and a perturbation that outlives the step


def history(directory: RunDirectory) -> pd.DataFrame:
    return pd.read_parquet(directory.path / "history.parquet").drop(columns="step_seconds")


@pytest.mark.parametrize(
    "method", [m if m in SHORT else pytest.param(m, marks=pytest.mark.long) for m in METHODS]
)
def test_traced_steps_are_the_steps_that_were_not(tmp_path: Path, method: str) -> None:
    """Bit for bit, with dropout: perturbed weights and second adapters are seen by the traced graph."""
    plain = finished(tmp_path / "plain", text_study(tmp_path, epochs=1), method)
    traced = finished(tmp_path / "traced", text_study(tmp_path, epochs=1, compile="aot_eager"), method)
    pd.testing.assert_frame_equal(history(plain), history(traced), check_exact=True)
    assert len(history(plain)) == 8


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full_ft"])
def test_in_bfloat16(tmp_path: Path, method: str) -> None:
    options = {"epochs": 1, "precision": "bf16"}
    plain = finished(tmp_path / "plain", text_study(tmp_path, **options), method)
    traced = finished(tmp_path / "traced", text_study(tmp_path, **options, compile="aot_eager"), method)
    pd.testing.assert_frame_equal(history(plain), history(traced), rtol=1e-2)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Any) -> Any:
        return (self.weight * x).sum()


def test_only_training_goes_through_the_compiled_pass() -> None:
    model = Counting()
    before = model.forward
    compiled = CompiledForward(model, "aot_eager")
    with compiled.active():
        assert model.forward is compiled._forward
    assert model.forward == before
    assert "forward" not in model.__dict__
    with CompiledForward(model, False).active():
        assert model.forward == before


def test_a_missing_compiler_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"train.compile: no C\+\+ compiler here \(no-such-compiler\)"):
        CompiledForward(Counting(), True)
    directory = prepared(tmp_path, **text_study(tmp_path, compile=True))
    assert finish(directory.path) == "failed"
    failure = json.loads((directory.path / "failure.json").read_text())
    assert failure["error"].startswith("InputError: train.compile: no C++ compiler")


@pytest.mark.long
def test_compiled_by_inductor(tmp_path: Path, kill_at_replacement: Any) -> None:
    """Fused kernels round otherwise; after an interruption the graph is another, and so are the last bits."""
    from flatbench.training.compilation import check_compiler

    try:
        check_compiler()
    except InputError as reason:
        pytest.skip(str(reason))
    from transformers import GPT2LMHeadModel

    from tests.tasks.task_cases import gpt2_folder, write_gsm8k

    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # inductor draws other dropout masks
    gpt2_folder(tmp_path / "gpt2", GPT2LMHeadModel, **still)
    write_gsm8k(tmp_path / "data")
    for method in TESTED:
        plain = finished(tmp_path / f"{method}-plain", text_study(tmp_path), method)
        compiled = finished(tmp_path / f"{method}-compiled", text_study(tmp_path, compile=True), method)
        pd.testing.assert_frame_equal(history(plain), history(compiled), rtol=1e-4)
    cut = prepared(tmp_path / "cut", "eflat_lora", **text_study(tmp_path, compile=True))
    kill_at_replacement(4)
    with pytest.raises(Killed):
        finish(cut.path)
    assert finish(cut.path) == "done"
    pd.testing.assert_frame_equal(history(cut), history(compiled), rtol=1e-4)
