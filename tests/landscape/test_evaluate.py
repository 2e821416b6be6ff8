"""The cheap ways of evaluating give the values of the plain loop, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatbench.errors import InputError, NotApplicableError
from flatbench.landscape import landscape
from flatbench.landscape.axes import Random
from flatbench.landscape.evaluation import evaluate
from flatbench.landscape.evaluation.evaluate import Evaluator
from flatbench.landscape.evaluation.replay import played, recorded, trace, unreached
from flatbench.landscape.explore import narrowed
from flatbench.models import factors
from flatbench.subject.objective import Objective
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import CASES, MLP, images, lora, mean_loss, same, snapshot, subject
from tests.measures.quadratics import known

POSITIONS = [(0.3, -0.2), (0.0, 0.0), (1.0, 1.0), (-0.5, 0.7), (0.25, 0.0)]


def plain(given: Subject, space: Any, only: str | None = None) -> list[float]:
    """Set parameters, forward; one point after the other."""
    found = []
    with in_space(given, space) as point:
        point = narrowed(point, only)
        first, second = [a.direction for a in Random().draw(given, point, 1, 2)]
        objective = Objective(given, point, None)
        for x, y in POSITIONS:
            with point.moved([x * a + y * b for a, b in zip(first, second, strict=True)]):
                found.append(objective.value())
    return found


def ours(
    given: Subject, space: Any, only: str | None = None, **options: Any
) -> tuple[list[float], Evaluator]:
    with in_space(given, space) as point:
        point = narrowed(point, only)
        draw = [a.direction for a in Random().draw(given, point, 1, 2)]
        with Evaluator(point, given.loss, {"train": given.batches}, [draw], **options) as evaluator:
            return [v["train"]["loss"] for v in evaluator.at(0, POSITIONS)], evaluator


@pytest.mark.parametrize("space", ["adapter", "merged", "all"])
@pytest.mark.parametrize("name", CASES)
def test_stacked_and_single_equal_the_plain_loop(name: str, space: str) -> None:
    given = subject(name)
    try:
        expected = plain(given, space)
    except NotApplicableError as reason:
        pytest.skip(str(reason))
    rel = 1e-6 if name == "gpt2_lora" else 1e-10  # transformers computes its loss in float32
    single, evaluator = ours(given, space, stack=1)
    assert evaluator.plan.stack == 1
    assert single == pytest.approx(expected, rel=rel)
    together, evaluator = ours(given, space, stack=3)
    assert together == pytest.approx(expected, rel=rel)
    if name != "dora" or space != "adapter":
        assert evaluator.plan.stack == 3
        assert evaluator.plan.notes == []


def test_what_cannot_be_stacked_says_so() -> None:
    """DoRA sends an identity matrix through A and B."""
    found, evaluator = ours(subject("dora"), "adapter", stack=3)
    assert evaluator.plan.stack == 1
    assert "not stacked" in evaluator.plan.describe()
    assert found == pytest.approx(plain(subject("dora"), "adapter"), rel=1e-10)


class Mixing(nn.Module):
    """Every example's answer depends on its batch, so that batches must neither be cut nor stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        output = self.layer(pixel_values)
        return type("Output", (), {"loss": (output.mean(0) ** 2).sum(), "logits": output})()


class Centring(nn.Module):
    """Takes the mean of its batch away."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class MixingInside(Mixing):
    """As Mixing, inside the body of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), Centring(), nn.Tanh())

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        return super().forward(self.body(pixel_values), labels)


def test_a_model_that_mixes_examples_is_evaluated_as_it_is() -> None:
    torch.manual_seed(0)
    for model, stacks in ((Mixing(), True), (MixingInside(), False)):
        given = Subject(model.double(), images(4), mean_loss, ["layer"], seed=0)
        found, evaluator = ours(given, "all", stack=4)
        assert found == pytest.approx(plain(given, "all"), rel=1e-10)
        assert any("batches as given" in note for note in evaluator.plan.notes)
        # a loss that mixes is computed point by point in any case
        assert any("not stacked" in note for note in evaluator.plan.notes) != stacks


class Convolutional(nn.Module):
    """Layers that stacking does not know, and one that reads its child's weights without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
        x = torch.tanh(self.convolution(pixel_values)).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x)[0].mean(1)
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits, labels)
        return type("Output", (), {"loss": loss, "logits": logits})()


@pytest.mark.parametrize("only", [None, "convolution", "out_proj", "head"])
def test_layers_of_other_kinds(only: str | None) -> None:
    torch.manual_seed(0)
    given = Subject(Convolutional().double(), images(1, 4, 4), mean_loss, ["head"], seed=0)
    expected = plain(given, "all", only)
    assert len(set(expected)) == 5
    for stack in (1, 4):
        found, evaluator = ours(given, "all", only, stack=stack)
        assert evaluator.plan.stack == (1 if only == "out_proj" else stack)
        assert found == pytest.approx(expected, rel=1e-10)


def deep() -> Subject:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = lora(vit_layers(4), ["q_proj", "v_proj"]).double()
        batches = images(1, 4, 4)
    return Subject(model, batches, mean_loss, factors.adapted_modules(model, []), seed=3)


def vit_layers(layers: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=6,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=8,
            image_size=4,
            patch_size=2,
            num_channels=1,
            num_labels=3,
        )
    )


def test_layers_below_the_first_changed_one_are_not_computed_again() -> None:
    given = deep()
    with in_space(given, "merged") as point:
        layers = [
            m for n, m in point.model.named_modules() if n.endswith(tuple(f"layers.{i}" for i in range(4)))
        ]
        counts = [0] * 4
        for i, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
        inside = [0] * 4
        for i, layer in enumerate(layers):  # played modules are called, but do nothing inside
            child = next(m for n, m in layer.named_modules() if n.endswith("q_proj"))
            child.register_forward_hook(lambda *_, i=i: inside.__setitem__(i, inside[i] + 1))
        upper = narrowed(point, r"layers\.[23]\.")
        draw = [a.direction for a in Random().draw(given, upper, 1, 2)]
        with Evaluator(upper, given.loss, {"train": given.batches}, [draw], stack=1) as evaluator:
            assert evaluator.plan.prefix >= 3
            list(evaluator.at(0, POSITIONS))
            before = list(inside)
            list(evaluator.at(0, POSITIONS[2:]))
    assert [after - b for after, b in zip(inside, before, strict=True)] == [0, 0, 3, 3]
    found = ours(given, "merged", r"layers\.[23]\.", stack=1)[0]
    assert found == pytest.approx(plain(given, "merged", r"layers\.[23]\."), rel=1e-10)


def test_recorded_outputs_played_back_are_the_outputs() -> None:
    given = subject("vit_lora")
    with in_space(given, "merged") as point, torch.no_grad():
        batch = given.batches[0]
        calls = trace(point.model, lambda: point.model(**batch))
        below = unreached(calls, {id(p) for p in point.parameters.values()})
        with recorded(below) as record:
            expected = point.model(**batch).logits
        with played(record):
            assert torch.equal(point.model(**batch).logits, expected)
        assert all("forward" not in vars(module) for module in point.model.modules())


def test_a_layer_shared_by_name_counts_as_changed_wherever_it_is_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.late.weight = self.early.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.late(torch.tanh(self.early(x)))

    model = Tied()
    calls = trace(model, lambda: model(torch.ones(2, 4)))
    assert unreached(calls, {id(model.late.weight)}) == []


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


def test_functions_of_the_logits_on_several_splits_at_once() -> None:
    given = subject("bert_lora")
    other = subject("bert_lora").batches[:1]
    data = {"train": given.batches, "test": other}

    def both(logits: Tensor, labels: Tensor) -> Mapping[str, float]:
        return {"mean": float(logits.mean()), "count": float(len(labels))}

    found = landscape(given, points=5, data=data, functions=[accuracy, both])
    assert set(found.frame["quantity"]) == {"loss", "accuracy", "mean", "count"}
    assert set(found.values("count")["value"]) == {13.0}
    assert set(found.values("count", "test")["value"]) == {5.0}
    with torch.no_grad(), in_space(given, "merged") as point:
        logits = torch.cat([point.model(**b).logits for b in given.batches])
        labels = torch.cat([b["labels"] for b in given.batches])
        assert found.meta["origin"]["train"]["accuracy"] == accuracy(logits, labels)
        assert found.meta["origin"]["train"]["mean"] == pytest.approx(float(logits.mean()))
    alone = landscape(given, points=5, data=data, functions=[accuracy, both], stack=1)
    assert alone.frame["value"].tolist() == pytest.approx(found.frame["value"].tolist(), rel=1e-9)


@pytest.mark.parametrize("calls", [1, 2, 4, 9])
@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("name", ["vit_head", "bert_lora", "mlp_full"])
def test_an_exception_in_the_middle_leaves_everything_as_found(name: str, stack: int, calls: int) -> None:
    class BrokenError(Exception):
        pass

    count = 0

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        nonlocal count
        count += 1
        torch.rand(1)
        if count == calls:
            raise BrokenError
        return mean_loss(model, batch)

    given = replace(subject(name), loss=loss)
    before = snapshot(given.model)
    storage = [p.data_ptr() for p in given.model.parameters()]
    with pytest.raises(BrokenError):
        landscape(given, dims=2, points=5, space="all", stack=stack)
    assert same(before, snapshot(given.model))
    assert storage == [p.data_ptr() for p in given.model.parameters()]
    assert all("forward" not in vars(module) for module in given.model.modules())


def test_interrupted_by_the_user() -> None:
    given = subject("vit_head")
    before = snapshot(given.model)

    def stop(done: int, total: int) -> None:
        torch.rand(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape(given, space="all", progress=stop)
    assert same(before, snapshot(given.model))


def test_losses_that_are_not_finite_are_given_as_they_are() -> None:
    found = landscape(known([9.0, 5, 3, 2, 1, 0.5]).subject, points=5, distance=1e200)
    values = found.values()["value"]
    assert not np.isfinite(values.tolist()[:2]).any()
    assert values.iloc[2] == found.loss


def test_small_passes_are_stacked_and_large_ones_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    given = subject("vit_lora")
    whole = landscape(given, points=5)
    assert whole.meta["stack"] > 1
    monkeypatch.setitem(evaluate.ACTIVATIONS, "cpu", 5 * 8 * 2)  # two examples of five tokens, eight wide
    cut = landscape(given, points=5)
    assert cut.meta["stack"] == 1
    assert "7 batches a point" in cut.meta["how"]
    assert cut.frame["value"].tolist() == pytest.approx(whole.frame["value"].tolist(), rel=1e-10)


def test_functions_need_labels_and_logits() -> None:
    class Silent(MLP):
        def forward(self, pixel_values: Tensor, labels: Tensor) -> Any:
            return type("Output", (), {"loss": super().forward(pixel_values, labels).loss})()

    given = subject("mlp_full")
    silent = Silent().double()
    with pytest.raises(InputError, match="no logits"):
        landscape(replace(given, model=silent), points=3, functions=[accuracy])


@pytest.mark.parametrize("stack", [1, 4])
def test_a_language_model_with_a_cache_of_keys_and_values(stack: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.measures.measure_cases import texts

    torch.manual_seed(0)
    shape = {"vocab_size": 11, "n_embd": 6, "n_layer": 3, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    adapted = factors.adapted_modules(model, ["c_attn"])
    given = Subject(model, texts(), mean_loss, adapted, seed=0)
    only = r"h\.[12]\."
    found, evaluator = ours(given, "merged", only, stack=stack)
    assert evaluator.plan.stack == stack
    assert evaluator.plan.prefix >= 4  # embeddings, dropout, the first block, a norm
    assert found == pytest.approx(plain(given, "merged", only), rel=1e-6)  # its loss is computed in float32


def test_what_a_model_puts_into_a_recorded_output_stays_out_of_the_record() -> None:
    """Qwen2.5-VL replaces a field of what its images' encoder gives back."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, values: Tensor) -> Tensor:
            output = self.inner(values)
            output.found = output.found + 1
            result: Tensor = output.found
            return result

    class Inner(nn.Module):
        def forward(self, values: Tensor) -> SimpleNamespace:
            return SimpleNamespace(found=2 * values)

    model, values = Model(), torch.arange(3.0)
    with recorded([model.inner]) as record:
        expected = model(values)
    for _ in range(2):
        with played(record):
            assert torch.equal(model(values), expected)
