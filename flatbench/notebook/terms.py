"""Of how many terms a loss is the mean: ways to count them, and a few rows of the data that tell which."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators.batches import chosen, joined
from flatbench.curvature.operators.idle import PASSED_OVER, passed_over
from flatbench.curvature.operators.pieces import sample_of
from flatbench.errors import InputError, shown
from flatbench.labels import count_terms, shifts, unwrapped
from flatbench.notebook.data import TARGETS, Batch
from flatbench.notebook.expected import SPAN, expected
from flatbench.subject.objective import first_examples, rows

#: (model, batch) -> (mean loss, its terms or None where nobody says, what the model gave back)
Raw = Callable[[nn.Module, Batch], tuple[Tensor, "int | None", Any]]
#: what a model raises that does not take a batch
REJECTED = (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError)
#: how many units in the last place two ways to a mean loss may differ
ROUNDING = 256
#: how far they may differ in any precision: some models add so much to the number they divide by
SLACK = 1e-5
#: batches, and rows of each, among which those are chosen that tell ways of counting apart
BATCHES, ROWS = 16, 16
#: how many parts of the data are looked at for classes that are new, and how many batches from everywhere
BY_LABEL, SPREAD = 8, 6
#: how many pairs of rows, and how many rows together, show of what terms a loss is the mean
PAIRS, TOGETHER = 4, 8
#: what rows give: their loss, its terms if it says them, the model's outputs, and the loss's rounding
Loss = tuple[float, "int | None", Any, float]


@dataclass(frozen=True)
class Count:
    """A way to count the terms that a batch's mean loss is of."""

    name: str
    of: Callable[[Batch], int]


def ways(model: nn.Module, own: bool) -> list[Count]:
    """Ways to count terms, the likeliest first."""
    shifted, known = shifts(model) and own, expected(model)

    def labels(batch: Batch) -> Tensor | None:
        names = (known.label, *TARGETS) if own else TARGETS
        return next((batch[n] for n in names if n in batch), None)

    def by_labels(shift: bool) -> Callable[[Batch], int]:
        def count(batch: Batch) -> int:
            found = labels(batch)
            return rows(batch) if found is None else count_terms(found, shift)

        return count

    def attended(shift: bool) -> Callable[[Batch], int]:
        def count(batch: Batch) -> int:
            mask = batch.get("attention_mask")
            if mask is None or mask.ndim != 2:
                return rows(batch)
            return int((mask[:, 1:] if shift else mask).ne(0).sum())

        return count

    def masked(batch: Batch) -> int:
        mask = batch.get("bool_masked_pos")
        return rows(batch) if mask is None else int(mask.ne(0).sum())

    def spans(batch: Batch) -> int:
        starts, ends = (batch[name] for name in SPAN)
        width = (
            batch["input_ids"].shape[1] if "input_ids" in batch else int(max(starts.max(), ends.max())) + 1
        )
        inside = [places < width for places in (starts, ends)]
        if not bool((inside[0] == inside[1]).all()):
            raise InputError("a row has its start in the text and its end behind it: it has half a term")
        return int(inside[0].sum())

    def without(ignored: Callable[[Tensor], Tensor]) -> Callable[[Batch], int]:
        def count(batch: Batch) -> int:
            found = labels(batch)
            if found is None or found.is_floating_point():
                return rows(batch)
            return int((~ignored(found)).sum())

        return count

    found = [
        Count("labels with one before them" if shifted else "labels", by_labels(shifted)),
        Count("labels" if shifted else "labels with one before them", by_labels(not shifted)),
        Count("examples", rows),
        Count("tokens", attended(False)),
        Count("tokens with one before them", attended(True)),
        Count("masked patches", masked),
        Count("labels that are not negative", without(lambda labels: labels < 0)),
    ]
    blank = getattr(getattr(unwrapped(model), "config", None), "semantic_loss_ignore_index", None)
    if own and isinstance(blank, int):
        found.insert(0, Count(f"labels that are not {blank}", without(lambda labels: labels == blank)))
    if own and known.kind == "span":
        found = [Count("examples with a span", spans), *found]
    if own and known.kind in ("score", "several", "none"):
        found.insert(0, Count("examples", rows))
    return found


class Probe:
    """A few rows of the data, on which a loss shows what it is."""

    def __init__(self, model: nn.Module, raw: Raw, data: Mapping[str, Sequence[Batch]]) -> None:
        self.model, self.raw, self.data = model, raw, data
        self.split, self.batch = next((split, batch) for split, bs in data.items() for batch in bs)

    def _loss(self, batch: Batch) -> Loss:
        """Loss, terms, outputs, and how many of the loss's digits are sure."""
        try:
            loss, terms, outputs = self.raw(self.model, batch)
        except REJECTED as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items())
            hint = ""
            if "padding token" in str(error):
                hint = "; set model.config.pad_token_id to the token that the batches are padded with"
            raise InputError(
                f"data: {self.split}: the model rejects a batch ({shapes}): "
                f"{type(error).__name__}: {shown(' '.join(str(error).split()), 300)}{hint}"
            ) from error
        kinds = {p.dtype for p in self.model.parameters()} | {loss.dtype}
        coarse = max(
            torch.finfo(k).eps if k.is_floating_point else torch.finfo(torch.bfloat16).eps for k in kinds
        )
        return float(loss), terms, outputs, max(SLACK, ROUNDING * coarse) * max(1.0, abs(float(loss)))

    def try_out(self) -> Any:
        """What the model gives back for two rows. Raises InputError; see `checked_loss`."""
        few = first_examples([self.batch], 2)[0]
        with passed_over(self.model) as missed:
            first, _, outputs, rounding = self._loss(few)
        if missed:
            raise InputError(f"adapted layers ({shown(', '.join(missed), 200)}) are {PASSED_OVER}")
        second = self._loss(few)[0]
        if abs(first - second) > rounding:
            raise InputError(
                f"data: {self.split}: two passes over the same rows give the losses {first:.6g} and "
                f"{second:.6g}: the model draws random numbers in its forward pass, and what is measured on "
                "it would be of no one function; put what it draws into the batches, or use loss="
            )
        return outputs

    def agreed(self, counts: Sequence[Count]) -> Count:
        """The first way to count by which the loss of rows together is the mean of theirs."""
        left = list(counts)
        tried: set[tuple[int, int, int]] = set()
        while len(tried) < PAIRS and (telling := self._informative_pair(left, tried)) is not None:
            left = self._fitting(left, telling)
            if len(left) == 1:
                break
        some = next((batch for batch in self._first_batches() if rows(batch) > 2), None)
        if some is not None:  # labels of all kinds: two rows do not show what happens to a third
            step = max(1, rows(some) // TOGETHER)
            places = range(0, rows(some), step)[:TOGETHER]
            left = self._fitting(left, [_row(some, places), *(_row(some, [i]) for i in places)])
        for parts in itertools.chain(self._by_label(), self._spread()):
            left = self._fitting(left, parts)
        return left[0]

    def _by_label(self) -> Iterator[Sequence[Batch]]:
        """Rows of classes that are new, and others, together and apart: classes may have weights.

        The others are of the same batch and of the one before, where batches fit together.
        """
        seen: set[Any] = set()
        shown = 0
        for batches in self.data.values():
            before: Batch | None = None
            for batch in batches:
                labels = next((batch[name] for name in TARGETS if name in batch), None)
                if labels is None or labels.ndim != 1 or labels.is_floating_point():
                    break
                values = labels.tolist()
                new = [i for i, value in enumerate(values) if value not in seen]
                old = [i for i, value in enumerate(values) if value in seen]
                seen |= set(values)
                several = len({values[i] for i in new}) > 1
                last, before = before, batch
                if not new:
                    continue
                mine = _row(batch, new[:TOGETHER])
                others = [_row(batch, old[:2])] if old else []
                others += [_row(last, [0, rows(last) - 1])] if last is not None else []
                if several:
                    others.append(_row(batch, [next(i for i in new if values[i] != values[new[0]])]))
                for other in others:
                    whole = joined(mine, other)
                    if whole is not None:
                        yield whole, mine, other
                        shown += 1
                if shown >= BY_LABEL:
                    return

    def _spread(self) -> Iterator[Sequence[Batch]]:
        """The shortest and the longest rows of batches from everywhere, together and apart."""
        everything = [batch for batches in self.data.values() for batch in batches if rows(batch) > 1]
        step = max(1, len(everything) // SPREAD)
        for batch in everything[::step][:SPREAD]:
            some = sample_of(batch, 4)
            half = rows(some) // 2
            yield some, _row(some, range(half)), _row(some, range(half, rows(some)))

    def _fitting(self, counts: Sequence[Count], parts: Sequence[Batch]) -> list[Count]:
        """The ways to count that fit the losses of rows together, which come first, and of each of them.

        Raises InputError where none fits.
        """
        whole, *each = (self._loss(batch) for batch in parts)
        if not math.isfinite(whole[0]):
            return list(counts)  # no number to compare: measures say it
        if whole[1] is not None:
            says = [int(found[1] or 0) for found in each]
            if whole[1] != sum(says):
                raise InputError(
                    f"loss=: says that {len(each)} rows have {whole[1]} terms, and apart {_list(says)}; it "
                    "must say of how many terms the loss is the mean"
                )
            numbers = {Count("what loss= says", lambda batch: 0): says}
        else:
            numbers = {count: [count.of(part) for part in parts[1:]] for count in counts}
        kept = [count for count, terms in numbers.items() if _is_mean(whole, each, terms)]
        if not kept:
            raise self._no_mean(whole, each)
        return kept

    def reads_padding(self) -> bool:
        """Whether the loss of a row changes when columns of padding on its right are cut off."""
        for batch in self._first_batches():
            mask = batch.get("attention_mask")
            if mask is None or mask.ndim != 2 or mask.shape[0] != rows(batch):
                continue
            for i, length in enumerate(_lengths(mask)[:ROWS]):
                if 0 < length < mask.shape[1]:
                    row = _row(batch, [i])
                    wide = mask.shape[1]
                    short = {k: v[:, :length] if v.shape[1:2] == (wide,) else v for k, v in row.items()}
                    (whole, _, _, rounding), (cut, *_) = self._loss(row), self._loss(short)
                    return abs(whole - cut) > rounding
        return False

    def _informative_pair(
        self, counts: Sequence[Count], tried: set[tuple[int, int, int]]
    ) -> tuple[Batch, Batch, Batch] | None:
        """Two rows of a batch, together and apart, on which the ways of counting differ most.

        None where there are none, or none that were not tried and on which they differ.
        """
        best: tuple[float, tuple[Batch, Batch, Batch], tuple[int, int, int]] | None = None
        for place, batch in enumerate(self._first_batches()):
            count = min(rows(batch), ROWS)
            parts = [_row(batch, [i]) for i in range(count)]
            numbers = [[c.of(part) for c in counts] for part in parts]
            usable = [i for i in range(count) if all(numbers[i])]
            for i in usable:
                for j in usable:
                    shares = [a / (a + b) for a, b in zip(numbers[i], numbers[j], strict=True)]
                    apart = max(shares) - min(shares)
                    here = (place, i, j)
                    if i < j and here not in tried and (best is None or apart > best[0]):
                        best = (apart, (_row(batch, [i, j]), parts[i], parts[j]), here)
        if best is None or (best[0] < 1e-3 and tried):
            return None
        tried.add(best[2])
        return best[1]

    def _first_batches(self) -> Iterator[Batch]:
        for batches in self.data.values():
            yield from batches[:BATCHES]

    def _no_mean(self, whole: Loss, each: Sequence[Loss]) -> InputError:
        values = (
            f"{len(each)} rows have the loss {whole[0]:.6g}, apart {_list([f'{e[0]:.6g}' for e in each])}"
        )
        if abs(whole[0] - sum(found[0] for found in each)) <= whole[3]:
            return InputError(f"{values}: the loss is a sum; it must be a mean over its terms")
        says = "over examples, labels or tokens" if whole[1] is None else "by the terms that loss= says"
        return InputError(
            f"{values}: it is no mean {says}, so it depends on how examples are batched; give a loss= that "
            "returns the mean loss and the number of its terms"
        )


def _is_mean(whole: Loss, each: Sequence[Loss], terms: Sequence[int]) -> bool:
    """Whether the loss of rows is the mean of theirs; a mean over nothing is NaN, and has no terms."""
    if any(count and not math.isfinite(found[0]) for count, found in zip(terms, each, strict=True)):
        return False
    total = sum(count * found[0] for count, found in zip(terms, each, strict=True) if count)
    return sum(terms) > 0 and abs(whole[0] - total / sum(terms)) <= whole[3]


def _list(values: Sequence[Any]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _lengths(mask: Tensor) -> list[int]:
    """Columns up to the last that is attended, of each row."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return [int(n) for n in (mask.ne(0) * places).amax(1)]


def _row(batch: Batch, places: Sequence[int]) -> dict[str, Tensor]:
    picked: dict[str, Tensor] = chosen(batch, torch.tensor(list(places)))
    return picked
