"""Eigenvalues of real models against their dense Hessians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import MeasureInterrupted
from flatbench.measures.hessian import Hessian, Track
from flatbench.models import factors as lora
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import mean_loss, subject


class TotalLoss(nn.Module):
    """The mean over all examples, in one batch per size: no weights, no loop of ours."""

    def __init__(self, given: Subject, point: Point) -> None:
        super().__init__()
        self.model = point.model
        self.batches = given.batches

    def forward(self) -> Tensor:
        together = {key: torch.cat([batch[key] for batch in self.batches]) for key in self.batches[0]}
        return mean_loss(self.model, together)[0]


def dense_hessian(given: Subject, space: str) -> Tensor:
    """``(n, n)``, by torch.autograd.functional over a flat vector of the space's parameters."""
    with in_space(given, space) as point, sdpa_kernel(SDPBackend.MATH):
        total = TotalLoss(given, point)
        names = {id(p): name for name, p in total.named_parameters()}
        shapes = {names[id(p)]: p.shape for p in point.parameters.values()}

        def loss(flat: Tensor) -> Tensor:
            parts = flat.split([shape.numel() for shape in shapes.values()])
            named = {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
            return torch.func.functional_call(total, named, ())

        flat = torch.cat([p.detach().flatten() for p in point.parameters.values()])
        return torch.autograd.functional.hessian(loss, flat, vectorize=True)


CASES = [
    (name, space)
    for name in ("mlp_lora", "vit_head", "bert_lora")
    for space in ("adapter", "merged", "all")
    if (name, space) != ("bert_lora", "all")
] + [("mlp_full", "merged"), ("mlp_full", "all"), ("vit_full", "merged"), ("gpt2_lora", "merged")]


def counted_in_tokens(given: Subject) -> Subject:
    """For GPT-2: its loss is a mean over the tokens that are predicted."""
    return replace(given, loss=lambda model, b: (model(**b).loss, b["labels"][:, 1:].numel()))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "space"), [case for case in CASES if case[0] != "gpt2_lora"])
def test_unasked_it_is_the_largest_and_not_one_of_a_saddle(name: str, space: str) -> None:
    given = subject(name)
    found = Hessian(space=space)(given)
    assert found["which"] == "LA"
    assert found["eigenvalue_1"] == pytest.approx(
        float(torch.linalg.eigvalsh(dense_hessian(given, space))[-1]), rel=1e-3
    )


#: PyHessian's iteration takes ten times as long
BY_PYHESSIAN = ("mlp_lora", "merged"), ("vit_head", "adapter"), ("vit_full", "merged")


@pytest.mark.parametrize(
    ("name", "space", "engine"),
    [(*case, "lanczos") for case in CASES]
    + [
        pytest.param(*case, "pyhessian", marks=[] if case in BY_PYHESSIAN else pytest.mark.long)
        for case in CASES
    ],
)
@pytest.mark.slow
def test_top_eigenvalues_are_those_of_the_dense_hessian(name: str, space: str, engine: str) -> None:
    given = subject(name)
    given = counted_in_tokens(given) if name == "gpt2_lora" else given
    expected = torch.linalg.eigvalsh(dense_hessian(given, space))
    largest = expected[expected.abs().argsort(descending=True)][:2]
    found = Hessian(space=space, k=2, tol=1e-8, which="LM", max_iterations=1000, engine=engine)(given)
    assert found["dimension"] == len(expected)
    if engine == "lanczos":
        assert found["converged"]
        # transformers computes causal language models' losses in float32
        assert found["certified"] or name == "gpt2_lora"
        for i in (1, 2):
            rounding = 1e-7 if name == "gpt2_lora" else 1e-12
            assert abs(found[f"eigenvalue_{i}"] - float(largest[i - 1])) <= found[f"error_{i}"] + rounding
    assert found["eigenvalue_1"] == pytest.approx(float(largest[0]), rel=1e-3)
    assert found["eigenvalue_2"] == pytest.approx(float(largest[1]), rel=1e-2)
    for i in (1, 2):
        error = (expected - found[f"eigenvalue_{i}"]).abs().min()
        assert error <= found[f"residual_{i}"] + (1e-7 if name == "gpt2_lora" else 1e-12)
        if engine == "pyhessian":
            assert found[f"error_{i}"] == found[f"residual_{i}"]
        elif found["certified"]:
            assert found[f"error_{i}"] <= 1e-8 * abs(found[f"eigenvalue_{i}"])
        assert found[f"relative_error_bound_{i}"] == pytest.approx(
            found[f"error_{i}"] / abs(found[f"eigenvalue_{i}"])
        )


def test_merged_curvature_does_not_see_the_gauge_and_adapter_curvature_does() -> None:
    plain, gauged = subject("vit_lora"), subject("vit_lora")
    mixing = torch.tensor([[3.0, 1.0], [0.0, 0.5]]).double()
    with torch.no_grad():
        for factors in lora.lora_factors(gauged.model):
            factors.B.copy_(factors.B @ mixing)
            factors.A.copy_(torch.linalg.solve(mixing, factors.A))
    options = {"tol": 1e-8, "max_iterations": 1000}
    merged = [Hessian(space="merged", **options)(s)["eigenvalue_1"] for s in (plain, gauged)]
    factors = [Hessian(space="adapter", **options)(s)["eigenvalue_1"] for s in (plain, gauged)]
    assert merged[0] == pytest.approx(merged[1], rel=1e-6)
    assert factors[0] != pytest.approx(factors[1], rel=0.1)


@pytest.mark.parametrize(("engine", "name"), [("lanczos", "lanczos"), ("pyhessian", "pyhessian 0.1")])
def test_result_keys(engine: str, name: str) -> None:
    found = Hessian(examples=7, engine=engine)(subject("vit_lora"))
    assert list(found) == [
        "eigenvalue_1",
        "upper_bound_1",
        "error_1",
        "residual_1",
        "relative_error_bound_1",
        "converged",
        "certified",
        "settled",
        "loss",
        "gradient_norm",
        "method",
        "way",
        "graph",
        "memory_bytes",
        "engine",
        "tol",
        "sampling_error_1",
        "examples",
        "example_gradients",
        "resolved",
        "which",
        "matrix",
        "gauge",
        "products",
        "seconds",
        "space",
        "dimension",
        "precision",
    ]
    assert (found["examples"], found["space"], found["engine"]) == (7, "merged", name)
    assert found["method"] == "double backward"


def test_only_the_first_examples_count() -> None:
    given = subject("mlp_full")
    short = replace(given, batches=[given.batches[0], {k: v[:2] for k, v in given.batches[1].items()}])
    found, expected = (Hessian(examples=n, tol=1e-3)(s) for n, s in ((7, given), (100, short)))
    assert found["eigenvalue_1"] == expected["eigenvalue_1"]
    assert found["sampling_error_1"] is None  # seven examples make one group
    assert Hessian(examples=100)(given)["examples"] == 13


def test_more_eigenvalues_than_dimensions() -> None:
    with pytest.raises(InputError, match="k: 1000"):
        Hessian(k=1000)(subject("vit_lora"))


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"tol": 0.0},
        {"max_iterations": 1},
        {"examples": 0},
        {"space": "half"},
        {"engine": "arpack"},
        {"which": "LA", "engine": "pyhessian"},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Hessian(**options)


class NoSecond(torch.autograd.Function):
    """A square with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def on_squared_logits(square):
    """A loss on the squares of the logits."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        logits = square(model(**batch).logits)
        return nn.functional.cross_entropy(logits, batch["labels"]), len(batch["labels"])

    return loss


def test_without_second_derivatives_gradients_are_differenced_and_it_is_said() -> None:
    given = subject("mlp_full")
    exact = Hessian(tol=1e-6)(replace(given, loss=on_squared_logits(torch.square)))
    found = Hessian()(replace(given, loss=on_squared_logits(NoSecond.apply)))
    assert found["method"] == "central differences"
    assert abs(found["eigenvalue_1"] - exact["eigenvalue_1"]) <= found["error_1"] + exact["error_1"]
    assert found["relative_error_bound_1"] < 1e-3


def test_where_exact_products_are_asked_for_the_measure_is_not_applicable() -> None:
    with pytest.raises(NotApplicableError, match="no second derivative"):
        Hessian(products="exact")(replace(subject("mlp_full"), loss=on_squared_logits(NoSecond.apply)))


def test_a_loss_that_ignores_the_space_is_an_error() -> None:
    given = replace(subject("mlp_full"), adapted=["unused"])
    with pytest.raises(FlatbenchError, match="depends on no parameter"):
        Hessian()(given)


def test_gauss_newton_is_positive_and_refuses_other_losses() -> None:
    found = Hessian(matrix="gauss_newton", which="SA", k=2)(subject("vit_full"))
    assert found["eigenvalue_1"] >= -1e-10
    assert found["matrix"] == "gauss_newton"
    with pytest.raises(NotApplicableError, match="one label"):
        Hessian(matrix="gauss_newton")(subject("gpt2_lora"))


def test_a_balanced_gauge_makes_the_adapter_comparable() -> None:
    plain, gauged = subject("vit_lora"), subject("vit_lora")
    with torch.no_grad():
        for factors in lora.lora_factors(gauged.model):
            factors.B.mul_(3)
            factors.A.div_(3)
    values = [
        Hessian(space="adapter", gauge=gauge, tol=1e-8)(given)["eigenvalue_1"]
        for gauge in ("balanced", "as_is")
        for given in (plain, gauged)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[2] != pytest.approx(values[3], rel=0.1)


def test_an_interrupt_keeps_what_converged() -> None:
    given, count = subject("vit_full"), 0

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        nonlocal count
        count += 1
        if count == 160:
            raise KeyboardInterrupt
        return mean_loss(model, batch)

    options = {"space": "all", "k": 30, "products": "differences"}
    with pytest.raises(MeasureInterrupted) as caught:
        Hessian(**options)(replace(given, loss=loss))
    values = caught.value.values
    assert values["converged"]
    assert "eigenvalue_1" in values
    assert "eigenvalue_30" not in values
    assert values["seconds"] > 0


def test_tracking_begins_from_the_last_vectors() -> None:
    given, track = subject("vit_full"), Track()
    measure = Hessian(k=3, verify=False)
    first, again = measure(given, track), measure(given, track)
    assert again["products"] < first["products"]
    assert again["eigenvalue_1"] == pytest.approx(first["eigenvalue_1"], rel=1e-3)
