"""Random directions against Li et al.'s definition (arXiv 1712.09913, Section 4), filter by filter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flatbench.landscape.axes import Random
from flatbench.landscape.explore import narrowed
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject
from tests.measures.measure_cases import mean_loss


class Every(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.convolution = nn.Conv2d(2, 5, 3)
        self.transposed = nn.ConvTranspose2d(2, 5, 3)
        self.conv1d = Conv1D(6, 4)  # 4 inputs, 6 outputs, stored (4, 6)
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)


#: what belongs to filter i of each weight, in the words of the layer's documentation
FILTERS = {
    "linear": (3, lambda w, i: w[i]),
    "convolution": (5, lambda w, i: w[i]),
    "transposed": (5, lambda w, i: w[:, i]),
    "conv1d": (6, lambda w, i: w[:, i]),
    "embedding": (7, lambda w, i: w[i]),
}


def directions(normalisation: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    given = Subject(Every().double(), [], mean_loss, [], seed=3)
    with in_space(given, "all") as point:
        (axis,) = Random(normalisation).draw(given, point, 9, 1)
        drawn = dict(zip(point.parameters, axis.direction, strict=True))
        return drawn, {name: p.detach().clone() for name, p in point.parameters.items()}


@pytest.mark.parametrize("layer", FILTERS)
def test_a_filter_is_a_gaussian_one_scaled_to_the_norm_of_the_weights_filter(layer: str) -> None:
    drawn, weights = directions("filter")
    gaussian, _ = directions("none")  # one factor for the whole, so each filter keeps its direction
    count, part = FILTERS[layer]
    d, g, w = (table[f"{layer}.weight"] for table in (drawn, gaussian, weights))
    for i in range(count):
        expected = part(g, i) * part(w, i).norm() / part(g, i).norm()
        torch.testing.assert_close(part(d, i), expected)
        assert float(part(d, i).norm()) == pytest.approx(float(part(w, i).norm()))


@pytest.mark.parametrize("normalisation", ["filter", "layer"])
def test_vectors_do_not_move(normalisation: str) -> None:
    drawn, weights = directions(normalisation)
    vectors = [name for name, w in weights.items() if w.ndim < 2]
    assert len(vectors) == 6
    assert not any(drawn[name].any() for name in vectors)
    assert all(drawn[name].any() for name in weights if name not in vectors)


def test_frozen_weights_move_with_their_space_and_only_with_it() -> None:
    """`requires_grad` says what trained; a space says what is moved."""
    model = Every().double().requires_grad_(False)
    given = Subject(model, [], mean_loss, ["linear"], seed=3)
    with in_space(given, "merged") as point:
        (axis,) = Random().draw(given, point, 0, 1)
        assert list(point.parameters) == ["linear.weight"]
        assert axis.direction[0].any()
    with in_space(replace(given, adapted=[]), "all") as point:
        assert len(narrowed(point, "conv").parameters) == 4


def test_draws_are_almost_orthogonal_and_repeat_with_the_seed() -> None:
    given = Subject(nn.Linear(60, 50), [], mean_loss, [], seed=3)
    with in_space(given, "all") as point:
        first, second = (a.direction[0] for a in Random().draw(given, point, 4, 2))
        again = Random().draw(given, point, 4, 2)
    assert torch.equal(first, again[0].direction[0])
    cosine = float((first * second).sum() / first.norm() / second.norm())
    assert abs(cosine) < 4 / 3000**0.5
