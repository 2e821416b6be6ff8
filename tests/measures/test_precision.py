"""One model in four precisions: values agree within the errors that they state, and zeros are not numbers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

from flatbench.curvature.operators import precision
from flatbench.curvature.operators.losses import transformers_loss
from flatbench.errors import FlatbenchError, InputError
from flatbench.landscape.explore import landscape
from flatbench.measures.hessian import Hessian
from flatbench.measures.sam_sharpness import SAMSharpness
from flatbench.measures.sharpness import Sharpness
from flatbench.measures.slice import Slice
from flatbench.measures.spectrum import Spectrum
from flatbench.notebook.display import Measured
from flatbench.report.resolution import unresolved
from flatbench.runs.remeasure import describe_measure
from flatbench.study import resolve_measure
from flatbench.subject.objective import Objective
from flatbench.subject.rounding import rounding_errors
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import same, snapshot, subject

HALF = (torch.float16, torch.bfloat16)
#: a small ball, whose rise is lost where the loss comes in steps of half precision
RHO = 1e-3


def stored(name: str, kind: torch.dtype) -> Subject:
    """A subject whose numbers are the same in all types: they have few bits, and are not too small."""
    given = subject(name)

    def few_bits(tensor: Tensor) -> Tensor:
        for half in (*HALF, *HALF):
            tensor = tensor.to(half)
        return tensor.to(kind)

    with torch.no_grad():
        for tensor in (*given.model.parameters(), *given.model.buffers()):
            if tensor.is_floating_point():
                gradient, tensor.grad = tensor.grad, None
                tensor.data = few_bits(tensor)
                tensor.grad = None if gradient is None else gradient.to(kind)
    batches = [{k: few_bits(v) if v.is_floating_point() else v for k, v in b.items()} for b in given.batches]
    return replace(given, model=given.model, batches=batches)


#: measure -> (value, its error) pairs of what it found
MEASURES: dict[str, tuple[Callable[..., Any], Callable[[Any], list[tuple[float, float]]]]] = {
    "sam": (
        functools.partial(SAMSharpness, rho=RHO, steps=3),
        lambda v: [(v["sharpness"], v["rounding_error"])],
    ),
    "worst": (
        functools.partial(Sharpness, rho=[RHO], steps=4),
        lambda v: [(v["sharpness"], v["rounding_error_1"])],
    ),
    "parts": (
        functools.partial(Sharpness, rho=[RHO, 2 * RHO], steps=3, m=5),
        lambda v: [(v[f"sharpness_{i}"], v[f"rounding_error_{i}"]) for i in (1, 2)],
    ),
    "average": (
        functools.partial(Sharpness, rho=[0.01], kind="average", samples=2),
        lambda v: [(v["sharpness"], v["rounding_error"])],
    ),
    "slice": (
        functools.partial(Slice, distance=0.05, points=3, directions=2),
        lambda v: [
            (v["mean_rise"], v["rounding_error"]),
            (v["curvature"], v["curvature_rounding_error"]),
        ],
    ),
    "hessian": (
        functools.partial(Hessian, k=2),
        lambda v: [(v[f"eigenvalue_{i}"], v[f"error_{i}"]) for i in (1, 2)],
    ),
    "spectrum": (
        functools.partial(Spectrum, probes=3, steps=4, points=5, tol=0.5, max_products=40),
        lambda v: [(v["trace"], v["trace_rounding_error"])],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("measure", MEASURES)
def test_values_of_one_model_agree_within_their_errors(measure: str) -> None:
    make, pairs = MEASURES[measure]
    name = "mlp_lora" if measure == "spectrum" else "gpt2_lora"
    truth = pairs(make()(stored(name, torch.float64)))
    single = make()(stored(name, torch.float32))
    for (value, error), (exact, own) in zip(pairs(single), truth, strict=True):
        assert abs(value - exact) <= error + own
        assert error + own < 0.1 * abs(exact)  # and they are told apart from 0
    for kind in HALF:
        # through a copy in float32, what has few bits is what it is in float32
        found = make()(stored(name, kind))
        assert pairs(found) == pairs(single)
        assert found["precision"] == "float32"
        assert found["stored_precision"] == str(kind)[6:]
        coarse = make(precision="as_stored")(stored(name, kind))
        assert coarse["precision"] == str(kind)[6:]
        for (value, error), (exact, own) in zip(pairs(coarse), truth, strict=True):
            assert abs(value - exact) <= error + own
            assert error > own


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("mlp_full", kind) for kind in (torch.float32, *HALF)), ("vit_lora", torch.bfloat16)],
)
def test_rounding_errors_hold_the_true_rise(name: str, kind: torch.dtype) -> None:
    """Against a copy of the whole model in float64, over all rows, in random directions of any length."""
    given = stored(name, kind)
    exact = copy.deepcopy(given.model).double().eval()
    rows = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in given.batches]
    held, errors = [], []

    def loss_of(model: nn.Module, batches: list[Any]) -> float:
        found = [given.loss(model, batch) for batch in batches]
        return sum(float(loss) * n for loss, n in found) / sum(n for _, n in found)

    with in_space(given, "all" if name == "mlp_full" else "adapter", precision="as_stored") as point:
        names = {id(p): n for n, p in point.model.named_parameters()}
        twins = [dict(exact.named_parameters())[names[id(p)]] for p in point.parameters.values()]
        objective = Objective(given, point, None)
        for seed in range(15):
            generator = torch.Generator().manual_seed(seed)
            size = 10 ** -(1 + seed % 3)
            step = [size * torch.randn(p.shape, generator=generator) for p in twins]
            rest = objective.value()
            with point.moved(step):
                rise = objective.value() - rest
            with torch.no_grad():
                before, old = loss_of(exact, rows), [p.clone() for p in twins]
                for twin, part in zip(twins, step, strict=True):
                    twin.add_(part)
                true = loss_of(exact, rows) - before
                for twin, own in zip(twins, old, strict=True):
                    twin.copy_(own)
            (error,) = rounding_errors(given.loss, point, given.batches, [lambda step=step: step])
            held.append(abs(rise - true) <= error)
            errors.append(error)
    assert sum(held) >= 14
    unit = torch.finfo(kind).eps
    assert unit / 10 < max(errors) < 30 * unit


# -- float32 through a copy ----------------------------------------------------------------------------------


def over_half(name: str, kind: torch.dtype) -> Subject:
    """Adapters and head in float32 over a base in half precision, as peft makes them."""
    given = stored(name, torch.float32)
    for key, parameter in given.model.named_parameters():
        if "lora_" not in key and "modules_to_save" not in key:
            parameter.grad = None
            parameter.data = parameter.data.to(kind)
            parameter.grad = torch.ones_like(parameter)
    return given


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["copies", "layer by layer"])
@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
def test_adapters_over_half_a_base_are_measured_in_float32(
    space: Any, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "SHARE", share)
    measures: list[Any] = [SAMSharpness(space=space, rho=RHO, steps=2)]
    if space == "merged":
        measures.append(Hessian(space=space))
    # a head in float32 does not run on half a base, but for measuring
    for name, kind in (("vit_lora", torch.bfloat16), ("vit_head", torch.float16)):
        expected = [measure(stored(name, torch.float32)) for measure in measures]
        given = over_half(name, kind)
        before = snapshot(given.model)
        places = {n: p.data_ptr() for n, p in given.model.named_parameters()}
        found = [measure(given) for measure in measures]
        assert same(snapshot(given.model), before)
        assert {n: p.data_ptr() for n, p in given.model.named_parameters()} == places
        assert found[0]["sharpness"] == expected[0]["sharpness"] > 0
        assert [v.get("eigenvalue_1") for v in found] == [v.get("eigenvalue_1") for v in expected]
        assert found[0]["below_resolution"] is False
        whole = sum(p.numel() * 4 for p in given.model.parameters() if p.dtype == kind)
        assert found[0]["copy_bytes"] <= whole
        if space != "all":
            assert (found[0]["copy_bytes"] < whole) == (share == 0)


def autocast(given: Subject) -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def prepared(given: Subject) -> Any:
    accelerate.state.AcceleratorState._reset_state()
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(given.model)
    return torch.no_grad()


@pytest.mark.parametrize("left_on", [autocast, prepared])
def test_autocast_that_is_left_on_is_off_inside(left_on: Any) -> None:
    measures: list[Any] = [SAMSharpness(rho=RHO, steps=2), Hessian(), Slice(points=3, directions=1)]
    expected = [measure(stored("vit_lora", torch.float32)) for measure in measures]
    given = stored("vit_lora", torch.float32)
    with left_on(given):
        found = [measure(given) for measure in measures]
        rough = SAMSharpness(rho=RHO, steps=2, precision="as_stored")(given)
    assert found[0]["sharpness"] == expected[0]["sharpness"]
    assert found[1]["eigenvalue_1"] == expected[1]["eigenvalue_1"]
    assert found[2]["losses"] == expected[2]["losses"]
    assert rough["below_resolution"]
    assert rough["rounding_error"] > 100 * expected[0]["rounding_error"]


def test_a_landscape_of_half_precision_is_not_constant() -> None:
    expected = landscape(stored("gpt2_lora", torch.float32), points=3, distance=1e-3)
    found = landscape(stored("gpt2_lora", torch.bfloat16), points=3, distance=1e-3)
    assert found.frame.equals(expected.frame)
    assert not found.below_resolution
    assert found.rounding_error is not None
    flat = landscape(stored("gpt2_lora", torch.bfloat16), points=3, distance=1e-3, precision="as_stored")
    assert flat.below_resolution
    assert "below resolution" in flat.describe()["Rounding"]
    assert found.meta["key"] not in (expected.meta["key"], flat.meta["key"])


def test_doubles_by_default_change_nothing() -> None:
    expected = SAMSharpness(rho=RHO, steps=2)(stored("gpt2_lora", torch.bfloat16))
    given = stored("gpt2_lora", torch.bfloat16)
    torch.set_default_dtype(torch.float64)
    try:
        found = SAMSharpness(rho=RHO, steps=2)(given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found["sharpness"] == pytest.approx(expected["sharpness"], abs=2 * expected["rounding_error"])


# -- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HALF)
def test_a_loss_of_half_precision_is_a_float32(kind: torch.dtype) -> None:
    given = stored("vit_full", kind)
    model, batch = given.model.eval(), given.batches[0]
    logits = model(pixel_values=batch["pixel_values"]).logits
    exact = nn.functional.cross_entropy(logits.float(), batch["labels"])
    loss, terms = transformers_loss(model, batch)
    assert loss.dtype == torch.float32
    assert terms == len(batch["labels"])
    assert float(loss) == float(exact)
    # the gradient is that of the finer loss
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == kind for p in model.parameters())


# -- what is written -----------------------------------------------------------------------------------------


def test_what_rounding_hides_is_not_written_as_a_number(tmp_path: Any) -> None:
    found = SAMSharpness(rho=1e-5, steps=2, precision="as_stored")(stored("gpt2_lora", torch.bfloat16))
    assert found["below_resolution"] is True
    text = unresolved(found)["sharpness"]
    assert text.startswith("below resolution (≤ ")
    assert found["rounding_error"] > 0
    assert f"sharpness={text}" in repr(Measured("sam_sharpness", found, False))
    assert text in Measured("sam_sharpness", found, False)._repr_html_()
    line = describe_measure(type("Run", (), {"id": "a1"})(), "sam", {"values": found})  # type: ignore[arg-type]
    assert f"sharpness {text}" in line
    two = Sharpness(rho=[1e-5, 1e-5], steps=1, precision="as_stored")(stored("gpt2_lora", torch.bfloat16))
    assert {"sharpness", "sharpness_1", "sharpness_2"} <= set(unresolved(two))
    older = {"sharpness": 0.0, "sampling_error": 0.1}
    assert unresolved(older) == {}
    assert "sharpness=0" in repr(Measured("sam_sharpness", older, False))


def test_a_choice_at_its_default_is_no_part_of_a_run() -> None:
    for name in ("hessian", "sam_sharpness", "sharpness", "slice", "spectrum"):
        assert "precision" not in resolve_measure(name, "study", "measures[0]")[1]
        _, chosen = resolve_measure({"name": name, "precision": "as_stored"}, "study", "measures[0]")
        assert chosen["precision"] == "as_stored"


def test_what_is_not_finite_in_half_precision_says_so() -> None:
    given = stored("vit_full", torch.float16)
    with torch.no_grad():
        for name, parameter in given.model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter.mul_(1e4)
    for measure in (SAMSharpness(precision="as_stored"), Hessian(precision="as_stored")):
        with pytest.raises(FlatbenchError, match=r"float16.*precision 'float32'"):
            measure(given)
    assert SAMSharpness(steps=1)(given)["loss"] > 0


def test_pyhessian_as_stored_has_the_error_of_its_precision() -> None:
    truth = Hessian(engine="pyhessian")(stored("mlp_lora", torch.float64))
    found = Hessian(engine="pyhessian", precision="as_stored")(stored("mlp_lora", torch.bfloat16))
    assert found["error_1"] > found["residual_1"] + 0.01 * found["eigenvalue_1"]
    assert abs(found["eigenvalue_1"] - truth["eigenvalue_1"]) <= found["error_1"]
    assert found["stored_precision"] == "bfloat16"


def test_a_landscape_in_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="'half' is none of"):
        landscape(stored("mlp_lora", torch.float32), precision="half")  # type: ignore[arg-type]


def test_an_error_that_cannot_be_told_is_none_and_breaks_nothing() -> None:
    """Kernels without float64, and losses of whole batches alone."""
    given = stored("mlp_lora", torch.float32)
    expected = SAMSharpness(rho=RHO, steps=2)(given)

    def single(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if batch["pixel_values"].dtype == torch.float64 or next(model.parameters()).dtype == torch.float64:
            raise KeyError("no kernel for float64")
        return given.loss(model, batch)

    def whole(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if len(batch["labels"]) not in (3, 5):
            raise RuntimeError("a batch has five examples")
        return given.loss(model, batch)

    unknown = SAMSharpness(rho=RHO, steps=2)(replace(given, loss=single))
    assert unknown["sharpness"] == expected["sharpness"]
    assert unknown["rounding_error"] is None
    assert unknown["below_resolution"] is None
    assert unresolved(unknown) == {}
    together = SAMSharpness(rho=RHO, steps=2)(replace(given, loss=whole))
    assert together["sharpness"] == expected["sharpness"]
    assert 0 < together["rounding_error"] < 100 * expected["rounding_error"]
