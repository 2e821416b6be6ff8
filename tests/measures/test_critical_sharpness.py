"""Critical sharpness against quadratics in closed form, fine line searches, and optimizers' own steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures import critical_sharpness as module
from flatbench.measures.base import Track
from flatbench.measures.critical_sharpness import CriticalSharpness, critical_sharpness
from flatbench.measures.line_search import first_rise
from flatbench.measures.relative_sharpness import RelativeCriticalSharpness
from flatbench.measures.updates import update_of
from flatbench.optim import EFlatLoRA
from flatbench.optim.moments import of_checkpoint
from flatbench.runs.finish import finish
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import CASES, mean_loss, same, snapshot, subject
from tests.measures.quadratics import known
from tests.measures.test_tracking import prepared

#: name, space and direction of ten small models
SMALL = [
    ("vit_lora", "merged", "gradient"),
    ("vit_head", "adapter", "adamw"),
    ("bert_lora", "merged", "gradient"),
    ("bert_lora", "adapter", "eflat_lora"),
    ("gpt2_lora", "adapter", "gradient"),
    ("dora", "adapter", "gradient"),
    ("vit_full", "all", "adamw"),
    ("mlp_lora", "adapter", "eflat_lora"),
    ("mlp_full", "merged", "gradient"),
    ("mlp_full", "all", "adamw"),
]
#: models that saturate along the line, where the loss rises late and a bracket stays wide
SATURATING = ("dora", "vit_full")


def total_loss(given: Subject, model: nn.Module | None = None) -> Tensor:
    found = [given.loss(model or given.model, batch) for batch in given.batches]
    return sum(loss * n for loss, n in found) / sum(n for _, n in found)  # type: ignore[return-value]


# -- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_of_a_quadratic(seed: int, scale: float) -> None:
    case = known([scale * v for v in (4.0, 3.0, 2.0, 1.0, 0.5, 0.1)], slope=scale, seed=seed)
    g = case.gradient
    exact = float(g @ case.curvature @ g / (g @ g))
    found = CriticalSharpness(space="all")(case.subject)
    assert found["critical_sharpness"] == pytest.approx(exact, rel=1e-6)
    assert found["lower_bound"] <= exact <= found["upper_bound"]
    assert found["converged"]
    assert found["forward_passes"] <= 8
    assert found["critical_lr"] == pytest.approx(2 / exact, rel=1e-6)
    assert found["rounding_error"] < 1e-4 * exact


def test_adamw_of_a_quadratic_is_its_directional_curvature() -> None:
    case = known([4.0, 3.0, 2.0, 1.0, 0.5, 0.1], seed=4)
    g = case.gradient
    update = g / (g.abs() + 1e-8)
    exact = float(update @ case.curvature @ update / (g @ update))
    found = CriticalSharpness(space="all", direction="adamw")(case.subject)
    assert found["critical_sharpness"] == pytest.approx(exact, rel=1e-6)
    assert found["moments"] == "one gradient"
    assert found["slope"] == pytest.approx(float(g @ update))


def test_relative_to_another_quadratic() -> None:
    """L₂ is the same function with other weights of its examples: a multiple, whose η_c is the same."""
    case = known([4.0, 3.0, 2.0, 1.0, 0.5, 0.1], seed=1)
    others = {"twice": lambda: [{"scale": torch.full((4,), 2.0).double()}]}
    given = replace(case.subject, others=others)
    g = case.gradient
    exact = float(g @ case.curvature @ g / (g @ g))
    found = RelativeCriticalSharpness(space="all", against="twice")(given)
    assert found["relative_critical_sharpness"] == pytest.approx(exact, rel=1e-6)
    assert found["forward_passes"] <= 8
    assert (found["examples"], found["other_examples"]) == (6, 4)
    # and of the negative of it every step is raising: no bracket, and no value that is none
    against = {"less": lambda: [{"scale": torch.full((4,), -1e-3).double()}]}
    found = RelativeCriticalSharpness(space="all", against="less")(replace(case.subject, others=against))
    assert found["relative_critical_sharpness"] is None
    assert found["rises_at_once"]
    assert found["upper_bound"] is None
    assert found["lower_bound"] > 1e3 * exact
    with pytest.raises(NotApplicableError, match="no other data called 'x'; there is twice"):
        RelativeCriticalSharpness(space="all", against="x")(given)


def test_of_any_function() -> None:
    weights = torch.tensor([3.0, -1.0], dtype=torch.float64)
    curvature = torch.diag(torch.tensor([2.0, 50.0], dtype=torch.float64))
    gradient = curvature @ weights
    before = weights.clone()
    found = critical_sharpness(lambda: float(weights @ curvature @ weights / 2), [weights], [gradient])
    exact = float(gradient @ curvature @ gradient / (gradient @ gradient))
    assert found["critical_sharpness"] == pytest.approx(exact, rel=1e-9)
    assert found["forward_passes"] <= 8
    assert torch.equal(weights, before)
    with pytest.raises(FlatbenchError, match="nan"):
        critical_sharpness(lambda: math.nan, [weights], [gradient])


# -- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [1.0, None])
@pytest.mark.parametrize("start", [1e-2, 1.0, 30.0])
def test_a_line_that_is_no_parabola(slope: float | None, start: float) -> None:
    def rise(step: float) -> float:
        return -step + step**2 / 0.7 + 2 * step**3

    exact = (-1 / 0.7 + math.sqrt(1 / 0.49 + 8)) / 4
    found = first_rise(rise, start, slope=slope)
    assert found.below <= exact <= found.above
    assert len(found.rises) <= 7
    assert found.above <= found.below * (1 + 1 / 16)
    assert found.step == pytest.approx(exact, rel=0.01)


def test_lines_without_a_crossing() -> None:
    falling = first_rise(lambda step: -step, 1.0, slope=1.0)
    assert falling.step is None
    assert falling.above == math.inf
    assert first_rise(lambda step: step, 1.0).below == 0
    calls: list[float] = []
    first_rise(lambda step: calls.append(step) or 1.0, 1.0, slope=-1.0)  # type: ignore[func-returns-value]
    assert calls == []
    # where the loss is not finite it counts as risen
    found = first_rise(lambda step: -step + step**2 if step < 3 else math.inf, 100.0, slope=1.0)
    assert found.below <= 1 <= found.above < 3


def test_rises_that_rounding_hides_bound_nothing() -> None:
    found = first_rise(lambda step: -step + step**2, 0.5, slope=1.0)
    assert found.trusted(0.0) == found
    wide = found.trusted(0.2)
    assert wide.below < found.below
    assert all(abs(rise) > 0.2 for rise in wide.rises.values())
    assert wide.below <= 1 <= wide.above


# -- small models -------------------------------------------------------------------------------------------


def fitted(name: str) -> Subject:
    """A small model after some steps of training, where the loss has a valley and not only slopes."""
    given = subject(name)
    model = given.model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-2)
    for _ in range(25):
        optimizer.zero_grad()
        total_loss(given).backward()
        optimizer.step()
    model.train()
    return given


class Moved:
    """The loss after a step, with the adapter merged by peft itself where the space asks for it."""

    def __init__(self, given: Subject, space: str, parts: Mapping[str, Tensor]) -> None:
        model: Any = copy.deepcopy(given.model).eval()
        if space != "adapter" and hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        named = dict(model.named_parameters())
        self.pairs = [(named[name], named[name].detach().clone(), part) for name, part in parts.items()]
        self.given, self.model = given, model

    def __call__(self, step: float) -> float:
        with torch.no_grad():
            for parameter, old, part in self.pairs:
                parameter.copy_(old - step * part)
            return float(total_loss(self.given, self.model))


@pytest.mark.parametrize(("name", "space", "direction"), SMALL)
def test_is_that_of_a_fine_line_search(
    name: str, space: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}

    def spy(point: Any, *rest: Any) -> Any:
        found = update_of(point, *rest)
        seen.update(zip(point.parameters, (p.clone() for p in found.parts), strict=True))
        return found

    monkeypatch.setattr(module, "update_of", spy)
    given = fitted(name)
    before = snapshot(given.model)
    found = CriticalSharpness(space=space, direction=direction)(given)  # type: ignore[arg-type]
    assert same(before, snapshot(given.model))
    assert found["forward_passes"] <= 8
    assert found["critical_sharpness"] is not None
    assert found["converged"] or name in SATURATING
    loss = Moved(given, space, seen)
    at_rest = loss(0.0)
    assert found["loss"] == pytest.approx(at_rest, rel=1e-6)
    # the first of many steps that raises the loss
    low, high = 2 / found["upper_bound"], 2 / found["lower_bound"]
    assert not any(loss(low * i / 10) > at_rest for i in range(1, 11))
    first = next(step for i in range(61) if loss(step := low + (high - low) * i / 60) > at_rest)
    assert found["lower_bound"] <= 2 / first <= found["upper_bound"]
    if found["converged"]:
        assert found["critical_sharpness"] == pytest.approx(2 / first, rel=0.01)


def test_fewer_examples_carry_a_sampling_error() -> None:
    found = CriticalSharpness(examples=10)(subject("vit_lora"))
    assert found["examples"] == 10
    assert found["sampling_error"] > 0
    assert CriticalSharpness(examples=5)(subject("vit_lora"))["sampling_error"] is None
    assert CriticalSharpness()(subject("vit_lora"))["sampling_error"] == 0.0


def test_goes_on_from_the_step_of_before() -> None:
    given, track = fitted("bert_lora"), Track()
    first = CriticalSharpness().during(given, track)
    again = CriticalSharpness().during(given, track)
    assert again["forward_passes"] <= first["forward_passes"]
    assert again["critical_sharpness"] == pytest.approx(first["critical_sharpness"], rel=0.01)


# -- optimizers ---------------------------------------------------------------------------------------------


def trained(method: str, steps: int, **options: Any) -> tuple[Subject, Any]:
    """A model with an optimizer in the middle of training, without dropout, at the unperturbed point."""
    given = fitted("bert_lora")
    model = given.model
    factors = [p for n, p in model.named_parameters() if ".lora_" in n]
    base = torch.optim.AdamW(factors, lr=1e-2, weight_decay=0.1)
    optimizer: Any = base if method == "adamw" else EFlatLoRA(base, model, rho=0.1)
    for _ in range(steps):
        step_of(given, optimizer)
    getattr(optimizer, "eval", lambda: None)()
    return replace(given, optimizer=optimizer), optimizer


def step_of(given: Subject, optimizer: Any) -> None:
    given.model.train()
    for part in given.model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    getattr(optimizer, "train", lambda: None)()
    optimizer.zero_grad()
    total_loss(given).backward()
    optimizer.step()


@pytest.mark.parametrize(("method", "direction"), [("adamw", "adamw"), ("eflat_lora", "eflat_lora")])
@pytest.mark.parametrize("steps", [0, 3])
def test_the_direction_is_the_optimizers_next_step(
    method: str, direction: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def spy(point: Any, *rest: Any) -> Any:
        seen.append((point.parameters, update_of(point, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(module, "update_of", spy)
    given, optimizer = trained(method, steps)
    if steps == 0 and method == "eflat_lora":
        pytest.skip("its first step is a plain one")
    found = CriticalSharpness(space="adapter", direction=direction)(given)  # type: ignore[arg-type]
    assert found["moments"] == ("live optimizer" if steps else "one gradient")
    before = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    step_of(given, optimizer)
    getattr(optimizer, "eval", lambda: None)()
    after = dict(given.model.named_parameters())
    ((parameters, update),) = seen
    for name, part in zip(parameters, update.parts, strict=True):
        torch.testing.assert_close(before[name] - 1e-2 * part, after[name].detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["adamw", "eflat_lora"])
def test_a_saved_state_is_that_of_the_live_optimizer(method: str, tmp_path: Path) -> None:
    given, optimizer = trained(method, 3)
    for name, p in given.model.named_parameters():
        p.requires_grad_(".lora_" in name)
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    measure = CriticalSharpness(space="adapter", direction=method)  # type: ignore[arg-type]
    live = measure(given)
    saved = replace(given, optimizer=None, optimizer_state=lambda: of_checkpoint(path, given.model))
    found = measure(saved)
    assert found["moments"] == "saved state"
    assert found["critical_sharpness"] == pytest.approx(live["critical_sharpness"], rel=1e-9)


def test_states_that_do_not_fit(tmp_path: Path) -> None:
    given, optimizer = trained("adamw", 1)
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    with pytest.raises(InputError, match="other parameters"):
        of_checkpoint(path, subject("mlp_full").model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="no optimizer's state"):
        of_checkpoint(path, given.model)
    torch.save(torch.optim.SGD(given.model.parameters(), lr=1.0).state_dict(), path)
    assert of_checkpoint(path, given.model) is None


def test_where_it_does_not_apply() -> None:
    given, _ = trained("adamw", 1)
    with pytest.raises(NotApplicableError, match="does not move"):
        CriticalSharpness(space="merged", direction="adamw")(given)
    other = torch.optim.RMSprop(given.model.parameters(), lr=1e-3)
    with pytest.raises(NotApplicableError, match="RMSprop has no AdamW"):
        CriticalSharpness(space="adapter", direction="adamw")(replace(given, optimizer=other))
    with pytest.raises(NotApplicableError, match="factors of LoRA"):
        CriticalSharpness(space="all", direction="eflat_lora")(subject("vit_full"))
    with pytest.raises(NotApplicableError, match="no adapter that could be switched off"):
        RelativeCriticalSharpness(space="all")(subject("vit_full"))
    flat = replace(subject("mlp_full"), loss=lambda model, batch: (0 * mean_loss(model, batch)[0], 1))
    with pytest.raises(NotApplicableError, match="stationary"):
        CriticalSharpness(space="all")(flat)


# -- against the base model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert_lora", "gpt2_lora"])
def test_relative_to_the_base_model(name: str) -> None:
    """The loss is the cross entropy to what the model says with its adapter off, over all tokens or rows."""
    given = subject(name)
    before = snapshot(given.model)
    found = RelativeCriticalSharpness(space="adapter")(given)
    assert same(before, snapshot(given.model))
    model: Any = given.model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in given.batches:
            with model.disable_adapter():
                wanted = model(**batch).logits.softmax(-1)
            terms = -(wanted * model(**batch).logits.log_softmax(-1)).sum(-1)
            total, count = total + float(terms.sum()), count + terms.numel()
    assert found["loss"] == pytest.approx(total / count, rel=1e-9)
    assert found["lower_bound"] > 0
    assert found["against"] == "base"
    assert found["forward_passes"] <= 8


def test_a_model_that_is_its_base_rises_with_every_step() -> None:
    """At B = 0 the cross entropy to the base is at its minimum: any step raises it."""
    given = subject("gpt2_lora")
    for name, p in given.model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    found = RelativeCriticalSharpness(space="adapter")(given)
    assert found["relative_critical_sharpness"] is None
    assert found["rises_at_once"]


def test_every_small_model_takes_part() -> None:
    assert {name for name, _, _ in SMALL} == set(CASES)


@pytest.mark.slow
def test_in_a_study_after_every_epoch_and_at_the_end(tmp_path: Path) -> None:
    """The direction during training is that of the run's own optimizer; afterwards it is of one gradient."""
    wanted = [
        {"name": "critical_sharpness", "space": "adapter", "direction": "eflat_lora", "every": 1},
        {"name": "relative_critical_sharpness", "against": "validation"},
    ]
    with_, without = prepared(tmp_path / "a", wanted), prepared(tmp_path / "b", [])
    assert finish(with_.path) == finish(without.path) == "done"
    assert (with_.result() or {})["weights"] == (without.result() or {})["weights"]
    history = pd.read_parquet(with_.path / "history.parquet")
    rows = history.dropna(subset=["critical_sharpness_adapter.moments"])
    assert rows["epoch"].tolist() == [1, 2, 3]
    assert rows["critical_sharpness_adapter.moments"].tolist() == ["live optimizer"] * 3
    stored = with_.measures()
    assert stored["critical_sharpness_adapter"]["values"]["moments"] == "one gradient"
    found = stored["relative_critical_sharpness_merged"]["values"]
    assert found["against"] == "validation"
    assert found["other_examples"] > 0
