"""The mean loss over ragged batches is exact, and examples are cut where they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flatbench.errors import FlatbenchError, InputError
from flatbench.subject.objective import Objective, first_examples, norm
from flatbench.subject.spaces import in_space
from tests.measures.measure_cases import mean_loss, subject


@pytest.mark.parametrize(
    ("examples", "sizes"),
    [(None, [5, 5, 3]), (13, [5, 5, 3]), (99, [5, 5, 3]), (10, [5, 5]), (7, [5, 2]), (1, [1])],
)
def test_first_examples(examples: int | None, sizes: list[int]) -> None:
    given = subject("bert_lora")
    batches = first_examples(given.batches, examples)
    assert [len(batch["labels"]) for batch in batches] == sizes
    for key in given.batches[0]:
        everything = torch.cat([b[key] for b in given.batches])
        assert torch.equal(torch.cat([b[key] for b in batches]), everything[: sum(sizes)])


def test_tensors_that_are_not_per_example_are_kept_whole() -> None:
    batch = {"x": torch.zeros(4, 2), "weights": torch.ones(3), "scale": torch.tensor(2.0)}
    cut = first_examples([batch], 2)[0]
    assert {key: tuple(value.shape) for key, value in cut.items()} == {
        "x": (2, 2),
        "weights": (3,),
        "scale": (),
    }


@pytest.mark.parametrize("batches", [[], [{"x": torch.zeros(0, 2)}]])
def test_no_examples(batches: list) -> None:
    with pytest.raises(InputError, match="no examples"):
        first_examples(batches, None)


def test_value_and_gradient_are_those_of_one_batch() -> None:
    given = subject("vit_full")
    together = {key: torch.cat([b[key] for b in given.batches]) for key in given.batches[0]}
    with in_space(given, "all") as point:
        objective = Objective(given, point, None)
        value, gradient = objective.gradient()
        loss = mean_loss(point.model, together)[0]
        loss.backward()
        assert (
            objective.value()
            == pytest.approx(value, rel=1e-10)
            == pytest.approx(float(loss.detach()), rel=1e-10)
        )
        for part, parameter in zip(gradient, point.parameters.values(), strict=True):
            expected = torch.zeros_like(part) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(part, expected)
        assert norm(gradient) == pytest.approx(float(torch.cat([g.flatten() for g in gradient]).norm()))


def test_a_batch_without_terms_counts_for_nothing() -> None:
    given = subject("mlp_full")

    def loss(model, batch):
        value, terms = mean_loss(model, batch)
        return (value, terms) if terms == 5 else (value * float("nan"), 0)

    with in_space(given, "merged") as point:
        whole = Objective(given, point, 10)
        holed = Objective(replace(given, loss=loss), point, None)
        assert holed.value() == whole.value() == holed.gradient()[0]
        assert holed.mean_loss().terms == [5, 5]
        nothing = Objective(replace(given, loss=lambda m, b: (mean_loss(m, b)[0], 0)), point, None)
        with pytest.raises(FlatbenchError, match="no terms"):
            nothing.value()
