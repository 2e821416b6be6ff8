"""Eigenvalues of real models against their dense Hessians."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from measure_cases import mean_loss, subject
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatbench import adapters
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import Subject
from flatbench.measures.hessian import Hessian
from flatbench.measures.spaces import Point, in_space


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
        shapes = {f"model.{name}": p.shape for name, p in point.parameters.items()}

        def loss(flat: Tensor) -> Tensor:
            parts = flat.split([shape.numel() for shape in shapes.values()])
            named = {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}
            return torch.func.functional_call(total, named, ())

        flat = torch.cat([p.detach().flatten() for p in point.parameters.values()])
        return torch.autograd.functional.hessian(loss, flat)


CASES = [
    (name, space)
    for name in ("mlp_lora", "vit_head", "bert_lora")
    for space in ("adapter", "merged", "all")
    if (name, space) != ("bert_lora", "all")
] + [("mlp_full", "merged"), ("mlp_full", "all"), ("vit_full", "merged"), ("gpt2_lora", "merged")]


@pytest.mark.parametrize(("name", "space"), CASES)
def test_top_eigenvalues_are_those_of_the_dense_hessian(name: str, space: str) -> None:
    given = subject(name)
    if name == "gpt2_lora":  # its loss is a mean over tokens of equal sequences
        given = replace(given, loss=lambda model, b: (model(**b).loss, b["labels"][:, 1:].numel()))
    expected = torch.linalg.eigvalsh(dense_hessian(given, space))
    largest = expected[expected.abs().argsort(descending=True)][:2]
    found = Hessian(space=space, k=2, tol=1e-8, max_iterations=1000)(given)
    assert found["dimension"] == len(expected)
    assert found["eigenvalue_1"] == pytest.approx(float(largest[0]), rel=1e-3)
    assert found["eigenvalue_2"] == pytest.approx(float(largest[1]), rel=1e-2)
    for i in (1, 2):
        error = (expected - found[f"eigenvalue_{i}"]).abs().min()
        assert error <= found[f"residual_{i}"] + 1e-12
        assert found[f"relative_error_bound_{i}"] == pytest.approx(
            found[f"residual_{i}"] / abs(found[f"eigenvalue_{i}"])
        )


def test_merged_curvature_does_not_see_the_gauge_and_adapter_curvature_does() -> None:
    plain, gauged = subject("vit_lora"), subject("vit_lora")
    mixing = torch.tensor([[3.0, 1.0], [0.0, 0.5]]).double()
    with torch.no_grad():
        for factors in adapters.lora_factors(gauged.model):
            factors.B.copy_(factors.B @ mixing)
            factors.A.copy_(torch.linalg.solve(mixing, factors.A))
    options = {"tol": 1e-8, "max_iterations": 1000}
    merged = [Hessian(space="merged", **options)(s)["eigenvalue_1"] for s in (plain, gauged)]
    factors = [Hessian(space="adapter", **options)(s)["eigenvalue_1"] for s in (plain, gauged)]
    assert merged[0] == pytest.approx(merged[1], rel=1e-6)
    assert factors[0] != pytest.approx(factors[1], rel=0.1)


def test_result_keys() -> None:
    found = Hessian(examples=7)(subject("vit_lora"))
    assert list(found) == [
        "eigenvalue_1",
        "residual_1",
        "relative_error_bound_1",
        "converged",
        "settled",
        "loss",
        "gradient_norm",
        "products",
        "seconds",
        "examples",
        "space",
        "dimension",
        "precision",
        "engine",
    ]
    assert (found["examples"], found["space"], found["engine"]) == (7, "merged", "pyhessian 0.1")


def test_only_the_first_examples_count() -> None:
    given = subject("mlp_full")
    short = replace(given, batches=[given.batches[0], {k: v[:2] for k, v in given.batches[1].items()}])
    assert Hessian(examples=7)(given)["eigenvalue_1"] == Hessian(examples=100)(short)["eigenvalue_1"]
    assert Hessian(examples=100)(given)["examples"] == 13


def test_more_eigenvalues_than_dimensions() -> None:
    with pytest.raises(InputError, match="k: 1000"):
        Hessian(k=1000)(subject("vit_lora"))


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"tol": 0.0}, {"max_iterations": 1}, {"examples": 0}, {"space": "half"}]
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Hessian(**options)


def test_a_loss_without_second_derivative_is_not_applicable() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("derivative for aten::flash is not implemented")

    given = subject("mlp_full")
    seen = 0

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        nonlocal seen
        seen += 1
        value, terms = mean_loss(model, batch)
        return (Once.apply(value) if seen > 6 else value), terms

    with pytest.raises(NotApplicableError, match="no second derivative"):
        Hessian()(replace(given, loss=loss))


def test_a_loss_that_ignores_the_space_is_an_error() -> None:
    given = replace(subject("mlp_full"), adapted=["unused"])
    with pytest.raises(FlatbenchError, match="depends on no parameter"):
        Hessian()(given)
