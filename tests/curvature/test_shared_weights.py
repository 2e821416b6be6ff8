"""Spaces of models whose weights are shared: the trained function inside, the same bits afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatbench import optim
from flatbench.curvature import HessianOperator
from flatbench.curvature.operators.entrance import entered
from flatbench.curvature.operators.fingerprint import fingerprint
from flatbench.curvature.operators.model_state import as_found
from flatbench.curvature.operators.spaces import parameters_of, spanned
from flatbench.errors import FlatbenchError, NotApplicableError
from flatbench.measures.sam_sharpness import SAMSharpness
from flatbench.models.factors import adapted_modules
from flatbench.notebook.load import load_checkpoint
from flatbench.subject.objective import norm
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.adapter_kinds import loss as rows_of
from tests.adapter_kinds import make as make_adapted
from tests.measures.measure_cases import same, snapshot
from tests.shared_cases import CASES, make, on_logits

#: models that compute in float32 somewhere, and DoRA, whose gradient takes its norms for constants
COARSE, DETACHED = ("t5", "llama"), ("gpt2 dora", "adapter")
#: parameters of two adapters that are views of one memory, which no gradient of one factor alone knows
REFUSED = {("gpt2 tied adapters", "adapter")}


def shared(model: nn.Module) -> list[tuple[str, str]]:
    """Pairs of names over one memory."""
    named = list(model.named_parameters(remove_duplicate=False))
    return [(a, b) for i, (a, x) in enumerate(named) for b, y in named[i:] if x.data_ptr() == y.data_ptr()]


@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
@pytest.mark.parametrize("name", CASES)
def test_the_function_inside_is_the_trained_one(name: str, space: Any) -> None:
    model, batch = make(name)
    before, pairs = snapshot(model), shared(model)
    with torch.no_grad(), as_found(model):
        expected = model(**batch).logits
    if (name, space) in REFUSED:
        with pytest.raises(NotApplicableError, match="same memory"), spanned(model, space):
            pass
    else:
        shapes = {key: p.shape for key, p in parameters_of(model, space).items()}
        with entered(model, space) as parameters, torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-12, atol=1e-12)
            assert shapes == {key: p.shape for key, p in parameters.items()}
    assert same(before, snapshot(model))
    assert pairs == shared(model)


@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_slope_along_a_step_of_the_space(name: str, space: Any) -> None:
    """A step moves what the gradient is of, wherever the weight is used, and not a bit is left of it."""
    if (name, space) in REFUSED or (name, space) == DETACHED:
        return
    coarse = name.startswith(COARSE)
    h, exact = (1e-3, 5e-3) if coarse else (1e-6, 1e-6)
    model, batch = make(name)
    modules = adapted_modules(model, [])
    given = Subject(model, [batch], on_logits, modules, seed=0)
    before = snapshot(model)
    with in_space(given, space) as point:
        loss, _ = on_logits(model, batch)
        if not loss.requires_grad:  # transformers' T5 calls other modules over the weight of `shared`
            assert name == "t5 shared"
            return
        slopes = torch.autograd.grad(loss, list(point.parameters.values()), allow_unused=True)
        generator = torch.Generator().manual_seed(1)
        step = [torch.randn(p.shape, generator=generator).double() for p in point.parameters.values()]
        step = [part / norm(step) for part in step]
        slope = sum(float((g * d).sum()) for g, d in zip(slopes, step, strict=True) if g is not None)
        moved = []
        for scale in (h, -h):
            with point.moved(step, scale), torch.no_grad():
                moved.append(float(on_logits(model, batch)[0]))
    assert (moved[0] - moved[1]) / (2 * h) == pytest.approx(slope, rel=exact, abs=exact)
    assert same(before, snapshot(model))


def test_each_adapted_layer_of_a_tied_weight_has_its_own_sum() -> None:
    model, _ = make("gpt2 both")
    inner: Any = model
    base = inner.base_model.model
    frozen = base.lm_head.base_layer.weight
    assert frozen is base.transformer.wte.base_layer.weight
    deltas = [layer.get_delta_weight("default") for layer in (base.transformer.wte, base.lm_head)]
    with spanned(model, "merged") as parameters:
        assert list(parameters) == [
            "transformer.wte.weight",
            "transformer.h.0.attn.c_attn.weight",
            "lm_head.weight",
        ]
        for key, delta in zip(("transformer.wte.weight", "lm_head.weight"), deltas, strict=True):
            torch.testing.assert_close(parameters[key], frozen + delta)
    with spanned(model, "all") as parameters:
        assert {"transformer.wte.weight", "lm_head.weight"} <= set(parameters)


def test_where_one_side_is_adapted_the_other_keeps_the_frozen_weight() -> None:
    model, _ = make("gpt2 wte")
    inner: Any = model
    frozen = inner.base_model.model.lm_head.weight
    kept = frozen.detach().clone()
    with spanned(model, "merged") as parameters:
        assert list(parameters) == ["transformer.wte.weight"]
        assert not torch.equal(parameters["transformer.wte.weight"], kept)
        assert torch.equal(inner.base_model.model.lm_head.weight, kept)
    with spanned(model, "all") as parameters:
        assert torch.equal(parameters["lm_head.weight"], kept)


def test_a_weight_that_nobody_adapts_is_one_parameter() -> None:
    model, _ = make("gpt2 head saved")
    inner: Any = model
    with spanned(model, "all") as parameters:
        base = inner.base_model.model
        assert parameters["transformer.wte.weight"] is base.transformer.wte.weight
        assert parameters["lm_head.weight"] is base.lm_head.modules_to_save["default"].weight
    from tests.shared_cases import gpt2

    plain = gpt2().double()
    assert "lm_head.weight" not in parameters_of(plain, "all")
    given = Subject(plain, [], on_logits, ["lm_head"], seed=0)
    with in_space(given, "merged") as point:
        assert list(point.parameters) == ["transformer.wte.weight"]


def test_dora_has_no_hessian_in_its_factors() -> None:
    model, batch = make("gpt2 dora")
    with pytest.raises(NotApplicableError, match=r"wte.*DoRA.*constants"):
        HessianOperator(model, on_logits, [batch], space="adapter").point()
    assert HessianOperator(model, on_logits, [batch], space="merged").point()[1].any()


def test_sam_sharpness_begins_at_the_trained_loss() -> None:
    model, batch = make("gpt2 both")
    given = Subject(model, [batch], on_logits, adapted_modules(model, []), seed=0)
    with torch.no_grad(), as_found(model):
        expected = float(on_logits(model, batch)[0])
    for space in ("adapter", "merged", "all"):
        assert SAMSharpness(space=space)(given)["loss"] == pytest.approx(expected, rel=1e-12)


# -- the guard --------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, 4, generator=generator).double(), torch.randint(0, 3, (6,), generator=generator)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Skewed(nn.Module):
    """An adapter that is merged wrongly: by a share of what it adds."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A, self.lora_B = (
            nn.ModuleDict({"x": nn.Linear(4, 1)}),
            nn.ModuleDict({"x": nn.Linear(1, 4)}),
        )
        self.merged_adapters: list[str] = []
        self.active_adapters, self.share = ["x"], share

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool) -> None:
        delta = self.lora_B["x"].weight @ self.lora_A["x"].weight
        self.base_layer.weight.data = self.base_layer.weight.data + self.share * delta
        self.merged_adapters.append("x")

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y if self.merged else y + x @ (self.lora_B["x"].weight @ self.lora_A["x"].weight).T


@pytest.mark.parametrize(
    ("kind", "share", "refused"),
    [
        (torch.float64, 1.0, False),
        (torch.float64, 1 + 1e-6, True),
        (torch.float32, 1.0, False),
        (torch.float32, 1.01, True),
        (torch.bfloat16, 1.0, False),
        (torch.bfloat16, 3.0, True),
    ],
)
def test_another_function_is_refused_with_both_losses(kind: torch.dtype, share: float, refused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Skewed(share), nn.Tanh(), nn.Linear(4, 3)).to(kind)
    with torch.no_grad():
        model[0].lora_B["x"].weight.fill_(0.7)
    x, y = rows()
    before = snapshot(model)
    operator = HessianOperator(model, cross_entropy, [(x.to(kind), y)], space="merged")
    if refused:
        with pytest.raises(
            NotApplicableError, match=r"'merged' .* loss on .* is [\d.]+ there and [\d.]+ outside"
        ):
            operator.point()
    else:
        operator.point()
    assert same(before, snapshot(model))
    HessianOperator(model, cross_entropy, [(x.to(kind), y)], space="adapter").point()


def test_a_model_that_norms_in_float32_is_not_refused_for_its_rounding() -> None:
    model, batch = make("llama embedding")
    with HessianOperator(model, on_logits, [batch], space="merged") as operator:
        operator.point()


@pytest.mark.parametrize("how", ["data", "buffer", "swap", "untie", "tie", "bit"])
def test_what_is_left_changed_is_said(how: str) -> None:
    model: Any = mlp()
    model.register_buffer("kept", torch.zeros(3))
    other = nn.Linear(4, 4).double()
    other.weight = model[0].weight
    model.append(nn.Identity()).append(other if how == "untie" else nn.Identity())
    weight = model[0].weight
    with pytest.raises(FlatbenchError, match=r"not as it was before .*weight"), entered(model, "all"):
        if how == "data":
            weight.data.add_(1e-9)
        elif how == "buffer":
            model.kept = torch.ones(3)
            weight.data[0, 0] = 5
        elif how == "swap":
            weight.data[[0, 1]] = weight.data[[1, 0]]
        elif how == "untie":
            other.weight = nn.Parameter(weight.detach().clone())
        elif how == "tie":
            model[2].weight.data = torch.zeros(12).double().as_strided((3, 4), (4, 1))
            model[2].weight.data.copy_(model[0].weight.data[:3])
        else:
            weight.data.view(torch.int64)[1, 1] ^= 1


def test_a_change_is_said_after_an_exception_too() -> None:
    model: Any = mlp()
    with pytest.raises(FlatbenchError, match=r"0\.weight has other values") as caught, entered(model, "all"):
        model[0].weight.data.zero_()
        raise ZeroDivisionError
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_every_write_changes_the_fingerprint() -> None:
    model: Any = mlp()
    start = fingerprint(model)
    assert not start.changes(fingerprint(model))
    assert not start.changes(fingerprint(copy.deepcopy(model)))
    for parameter in model.parameters():
        flat = parameter.data.view(-1).view(torch.uint8)
        for i in range(0, len(flat), 7):
            flat[i] ^= 16
            assert start.changes(fingerprint(model))
            flat[i] ^= 16
    assert not start.changes(fingerprint(model))


def test_the_fingerprint_of_other_devices_sees_every_byte() -> None:
    from flatbench.curvature.operators.fingerprint import _weigh

    data = torch.randint(0, 256, (37,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start = int(_weigh(data))
    for i in range(len(data)):
        changed = data.clone()
        changed[i] += 1
        assert int(_weigh(changed)) != start
    assert int(_weigh(data.flip(0))) != start


def test_views_that_overlap_are_refused_and_views_side_by_side_are_not() -> None:
    class Views(nn.Module):
        def __init__(self, second: Tensor, first: Tensor) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(first), nn.Parameter(second)

    memory = torch.randn(6, 6).double()
    for good in (memory[:, 3:], memory[3:]):
        first = memory[:, :3] if good.shape == (6, 3) else memory[:3]
        with spanned(Views(good, first), "all") as parameters:
            assert len(parameters) == 2
    for bad in (memory.T, memory[:, 2:], memory[:4]):
        for only in (None, "a".__eq__, "b".__eq__):
            with (
                pytest.raises(NotApplicableError, match="same memory"),
                spanned(Views(bad, memory), "all", only),
            ):
                pass


def test_a_look_up_that_rewrites_its_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=0.1), nn.Flatten(), nn.Linear(8, 3)).double()
    batch = (torch.randint(0, 5, (4, 2)), torch.randint(0, 3, (4,)))
    before = snapshot(model)
    with pytest.raises(NotApplicableError, match="max_norm"):
        HessianOperator(model, cross_entropy, [batch]).point()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", ["eflat_lora", "flat_lora_rwp", "bi_lora", "msam"])
@pytest.mark.parametrize("space", ["adapter", "merged"])
def test_between_steps_of_a_training_the_unperturbed_model_is_measured(name: str, space: Any) -> None:
    """The methods with one gradient a step wait at a moved point; training goes on as if nothing had been."""
    found: list[Any] = []
    ends = []
    for measured in (False, True):
        model, batch = make_adapted("linear")
        base = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
        options: Any = {"total_steps": 9} if name == "flat_lora_rwp" else {}
        optimizer: Any = optim.REGISTRY.load(name)(base, model, **options)

        def closure(model: nn.Module = model, batch: Any = batch) -> Tensor:
            model.train().zero_grad()
            found = rows_of(model, batch)[0]
            found.backward()
            return found

        for step in range(6):
            if step == 3 and measured:
                operator = HessianOperator(model, rows_of, [batch], space=space)
                found.append(operator.point())
            elif step == 3:
                optimizer.eval()
                found.append(HessianOperator(copy.deepcopy(model), rows_of, [batch], space=space).point())
                optimizer.train()
            optimizer.step(closure)
        optimizer.eval()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_parameters_of_a_type_of_their_own_are_put_back() -> None:
    class Own(nn.Parameter):
        pass

    model, batch = make_adapted("linear")
    inner: Any = model
    base = inner.base_model.model.kept.base_layer
    base._parameters["weight"] = Own(base.weight.data, requires_grad=False)
    before, data = snapshot(model), base.weight.data_ptr()
    with torch.no_grad(), as_found(model):
        expected = model(**batch).logits
        with entered(model, "merged", loss=lambda rows: rows_of(model, rows), batches=[batch]):
            torch.testing.assert_close(model(**batch).logits, expected)
    assert same(before, snapshot(model))
    assert base.weight.data_ptr() == data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2 both", "bert both", "llama replicated"])
def test_a_notebook_measures_the_trained_model(name: str) -> None:
    model, batch = make(name)
    with torch.no_grad(), as_found(model):
        expected = pytest.approx(float(model(**batch).loss), rel=1e-6)
    before = snapshot(model)
    opened = load_checkpoint(model, [batch])
    for space in ("merged", "all"):
        assert opened.sharpness(space=space, cached=False)["loss"] == expected
        assert opened.hessian(space=space, cached=False, verify=False, max_iterations=4)["loss"] == expected
        assert opened.landscape(space=space, points=3, cached=False, progress=False).loss == expected
    assert same(before, snapshot(model))
