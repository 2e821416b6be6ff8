"""EFlat-LoRA's averaged perturbation against the one that it stands for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from flatbench.errors import NotApplicableError
from flatbench.measures.ema_gap import EMAGap
from flatbench.models import factors as lora
from flatbench.optim import SAM, EFlatLoRA
from flatbench.runs.finish import finish
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import same, snapshot, subject
from tests.measures.test_tracking import prepared


def loss_of(given: Subject) -> Any:
    """Mean over the batches by their terms, in evaluation mode."""
    given.model.eval()
    found = [given.loss(given.model, batch) for batch in given.batches]
    return sum(loss * terms for loss, terms in found) / sum(terms for _, terms in found)


def trained(steps: int, **options: Any) -> tuple[Subject, EFlatLoRA]:
    given = subject("bert_lora")
    parameters = [p for p in given.model.parameters() if p.requires_grad]
    optimizer = EFlatLoRA(torch.optim.SGD(parameters, lr=0.05), given.model, **{"rho": 0.3, **options})

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(given)
        loss.backward()
        return loss

    for _ in range(steps):
        given.model.train()
        optimizer.step(closure)
    optimizer.eval()
    return replace(given, optimizer=optimizer), optimizer


def test_against_pseudo_inverses_of_the_factors() -> None:
    """E worked out from the paper's equations, with both perturbations put into B by hand."""
    given, optimizer = trained(3, grad_estimate="average", rho_schedule="inv_sqrt")
    model, rho = given.model, 0.3 / 4**0.5
    before = snapshot(model)
    found = EMAGap(examples=10**6)(given)
    assert same(before, snapshot(model))
    factors = lora.lora_factors(model)
    base = loss_of(given)
    gradients = torch.autograd.grad(base, [p for f in factors for p in (f.B, f.A)])
    full = []
    for f, g_B, g_A in zip(factors, gradients[::2], gradients[1::2], strict=True):
        A, B = f.A.detach().double(), f.B.detach().double()
        first = g_B.double() @ torch.linalg.pinv(A.T) / f.scaling
        full.append((first + torch.linalg.pinv(B.T) @ g_A.double() / f.scaling) / 2)
    length = sum(float(g.square().sum()) for g in full) ** 0.5
    ranks = {
        id(w): value
        for w, value in zip(optimizer.full_space.weights, optimizer.average_perturbation() or (), strict=True)
    }
    moves = {
        "ema_sharpness": [ranks[id(f.B)] for f in factors],
        "sam_sharpness": [
            rho * g / length @ torch.linalg.pinv(f.A.detach().double()) / f.scaling
            for f, g in zip(factors, full, strict=True)
        ],
    }
    for name, values in moves.items():
        kept = [f.B.detach().clone() for f in factors]
        with torch.no_grad():
            for f, value in zip(factors, values, strict=True):
                f.B.add_(value.to(f.B.dtype))
            assert found[name] == pytest.approx(float(loss_of(given) - base), rel=1e-3, abs=1e-7)
            for f, old in zip(factors, kept, strict=True):
                f.B.copy_(old)
    assert found["gap"] == found["ema_sharpness"] - found["sam_sharpness"]
    assert found["loss"] == pytest.approx(float(base.detach()), rel=1e-6)
    assert found["rho"] == pytest.approx(rho)


def test_an_average_of_new_perturbations_alone_closes_the_gap() -> None:
    """With beta = 1 and a learning rate of zero, Ê is taken where E is, on the same examples, and is E."""
    given = subject("bert_lora")
    parameters = [p for p in given.model.parameters() if p.requires_grad]
    optimizer = EFlatLoRA(torch.optim.SGD(parameters, lr=0.0), given.model, rho=0.01, beta=1.0)
    optimizer.zero_grad()  # the model comes with some
    loss_of(given).backward()
    optimizer.step()
    optimizer.eval()
    found = EMAGap(examples=10**6)(replace(given, optimizer=optimizer))
    assert found["sam_sharpness"] > 0
    assert abs(found["gap"]) < 1e-3 * found["sam_sharpness"]


def test_where_it_does_not_apply() -> None:
    given, _ = trained(0)
    with pytest.raises(NotApplicableError, match="no step"):
        EMAGap()(given)
    with pytest.raises(NotApplicableError, match="during training"):
        EMAGap()(replace(given, optimizer=None))
    parameters = [p for p in given.model.parameters() if p.requires_grad]
    other = SAM(torch.optim.SGD(parameters, lr=0.1), given.model)
    with pytest.raises(NotApplicableError, match="SAM keeps no average"):
        EMAGap()(replace(given, optimizer=other))


@pytest.mark.slow
def test_a_run_has_it_after_every_epoch_and_trains_as_without(tmp_path: Path) -> None:
    measures = [
        {"name": "ema_gap", "every": 1, "examples": 40},
        {"name": "balancedness", "every": 1},
        {"name": "interference", "every": 1, "examples": 40},
    ]
    with_, without = prepared(tmp_path / "a", measures), prepared(tmp_path / "b", [])
    assert finish(with_.path) == finish(without.path) == "done"
    assert (with_.result() or {})["weights"] == (without.result() or {})["weights"]
    rows = pd.read_parquet(with_.path / "history.parquet").dropna(subset=["ema_gap.gap"])
    assert rows["epoch"].tolist() == [1, 2, 3]
    assert "during training" in with_.measures()["ema_gap"]["skipped"]
    # balancedness layer by layer: their mean is the mean that is given, and the last are the finished model's
    layers = rows[[c for c in rows.columns if c.startswith("balancedness.layer_")]]
    pd.testing.assert_series_equal(layers.mean(axis=1), rows["balancedness.balancedness"], check_names=False)
    final = with_.measures()["balancedness"]["values"]["balancedness_by_layer"]
    assert layers.iloc[-1].tolist() == pytest.approx(final)
    # the average is the optimizer's, which is gone afterwards
    assert rows["interference.eflat_lora_cosine"].between(-1, 1).all()
    assert rows["interference.eflat_lora_norm"].tolist() == pytest.approx(rows["ema_gap.average_norm"])
    finished = with_.measures()["interference"]["values"]
    assert "eflat_lora_norm" not in finished
    assert rows["interference.sam_cosine"].iloc[-1] == pytest.approx(finished["sam_cosine"])
