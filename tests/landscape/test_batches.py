"""Packing batches: the same examples, less padding, the partition with the least work."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from flatbench.landscape.evaluation.packing import Packing, packed, partition_lengths
from flatbench.subject.objective import rows, weighted_mean
from tests.measures.measure_cases import mean_loss, subject


def texts(lengths: list[int], width: int, first: int = 1) -> dict[str, Tensor]:
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(first, first + len(lengths))[:, None] * 100 + torch.arange(width)
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.arange(first, first + len(lengths)),
    }


def sentences(batches: list) -> set:
    found = set()
    for batch in batches:
        for ids, mask, label in zip(
            *(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            found.add((int(label), tuple(ids[mask.bool()].tolist())))
    return found


def test_every_sentence_is_there_once_without_padding() -> None:
    batches = [texts([3, 9, 5], 9), texts([2, 9], 12, first=4), texts([5], 5, first=6)]
    found = packed(batches, Packing(tokens=10, overhead=0.0))
    assert sentences(found) == sentences(batches)
    assert sum(map(rows, found)) == 6
    assert all(bool(batch["attention_mask"].all()) for batch in found)
    assert max(batch["input_ids"].numel() for batch in found) <= 10


def test_what_stands_in_the_padding_of_one_row_is_not_cut_off() -> None:
    batch = texts([3, 9, 5, 4], 9)
    batch["labels"] = batch["input_ids"].clone().masked_fill(batch["attention_mask"] == 0, -100)
    assert len(packed([batch], Packing(tokens=10, overhead=0.0))) > 1
    batch["labels"][2, 7] = 3
    (kept,) = packed([batch], Packing(tokens=10, overhead=0.0))
    assert kept is batch


def test_beginning_a_batch_weighs_against_padding() -> None:
    batches = [texts([4, 5, 6, 7, 30], 30)]
    assert [rows(b) for b in packed(batches, Packing(1000, overhead=8.0))] == [4, 1]
    assert [rows(b) for b in packed(batches, Packing(1000, overhead=1000.0))] == [5]


@pytest.mark.parametrize("seed", range(5))
def test_the_partition_is_the_best_one(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted(draw.randint(1, 20) for _ in range(9))
    packing = Packing(draw.choice([20, 40, 1000]), draw.choice([0.5, 5, 30]))

    def cost(ranges: list[tuple[int, int]]) -> float:
        sizes = [(b - a) * lengths[b - 1] for a, b in ranges]
        allowed = all(s <= packing.tokens or b - a == 1 for s, (a, b) in zip(sizes, ranges, strict=True))
        return sum(sizes) + packing.overhead * len(ranges) if allowed else float("inf")

    every = []
    for cuts in itertools.product([False, True], repeat=8):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 9]
        every.append(cost(list(itertools.pairwise(edges))))
    assert cost(partition_lengths(lengths, packing)) == min(every)


def test_labels_of_tokens_are_padded_with_what_counts_for_nothing() -> None:
    batches = [texts([4, 4], 4), texts([5], 5, first=3)]
    for batch in batches:
        batch["labels"] = batch["input_ids"].clone()
    (found,) = packed(batches, Packing(1000, overhead=100.0))
    assert found["labels"].shape == (3, 5)
    assert found["labels"][:2, 4].tolist() == [-100, -100]
    assert found["attention_mask"][:2, 4].tolist() == [0, 0]


def test_padding_on_the_left_stays() -> None:
    batch = texts([3, 5], 5)
    batch = {k: v.flip(1) if v.ndim == 2 else v for k, v in batch.items()}
    (found,) = packed([batch], Packing(1000, 0.0))
    assert found is batch


def test_images_are_cut_and_joined_to_an_even_size() -> None:
    batches = [{"pixel_values": torch.randn(n, 1, 2, 2), "labels": torch.arange(n)} for n in (7, 7, 2)]
    found = packed(batches, Packing(6, 0.0))
    assert [rows(b) for b in found] == [5, 5, 6]
    assert torch.equal(torch.cat([b["labels"] for b in found]), torch.cat([b["labels"] for b in batches]))


def test_what_cannot_be_taken_apart_is_left_alone() -> None:
    odd = [{"x": torch.ones(4, 2), "scale": torch.tensor(2.0)}]
    assert packed(odd, Packing(1, 0.0)) == odd
    other = [{"x": torch.ones(4, 2), "table": torch.ones(3, 2)}]
    assert packed(other, Packing(1, 0.0)) == other


def test_packing_again_changes_nothing() -> None:
    batches = [texts([3, 9, 5], 9), texts([2, 9], 12, first=4)]
    once = packed(batches, Packing(20, 3.0))
    again = packed(once, Packing(20, 3.0))
    assert all(a is b for a, b in zip(once, again, strict=True))


def test_the_loss_is_the_same() -> None:
    given = subject("bert_lora")
    given.model.eval()
    better = packed(given.batches, Packing(14, 1.0))
    assert len(better) > len(given.batches)
    with torch.no_grad():
        old, new = (
            weighted_mean([(float(loss), n) for loss, n in (mean_loss(given.model, b) for b in batches)])
            for batches in (given.batches, better)
        )
    assert new == pytest.approx(old, rel=1e-10)
