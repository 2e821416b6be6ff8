"""Checks of an operator's loss: whether it is random, a mean over rows, coarse, and depends on padding.

All is compared on rows of the batches, without a gradient.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatbench.curvature.operators import batches as cutting
from flatbench.curvature.operators import pieces as planning
from flatbench.curvature.operators.base import SymmetricOperator
from flatbench.curvature.operators.losses import HALF
from flatbench.curvature.operators.precision import types_computed
from flatbench.errors import FlatbenchError, InputError

log = logging.getLogger(__name__)

#: rows of which a loss is compared with that of their halves
_FEW = 16


class CheckedLoss(SymmetricOperator):
    """An operator over batches of a loss that is looked at before it is differentiated."""

    batches: list[Any]
    memory: int | None
    shapes: dict[str, torch.Size]
    _parameters: list[nn.Parameter]
    _shorten: bool
    #: whether other processes hold further batches of the same loss
    is_part: bool = False
    _told_padding: bool = False
    #: whether the loss is the model's own, and its terms are what its labels say
    _own_loss: bool = False
    #: whether the loss came without its terms, which are taken to be the batch's rows then
    _without_terms: bool = False
    #: how often each tensor of the batches had been written to when the operator was opened
    _versions: Sequence[int] = ()

    @abstractmethod
    def _evaluate(self, batch: Any) -> tuple[Tensor, int]:
        """Mean loss and terms of a batch on the device."""

    @abstractmethod
    def _row_loss(self, batch: Any) -> tuple[Tensor, int]:
        """Loss and terms of some rows, wherever they are."""

    def _losses_of_samples(self) -> list[float]:
        """Losses of a few rows: of a batch, and of each that has positions, which may be packed."""
        placed = [b for b in self.batches if isinstance(b, Mapping) and "position_ids" in b]
        with torch.no_grad():
            return [float(self._sampled(batch)[0]) for batch in placed or self.batches[:1]]

    def _sampled(self, batch: Any) -> tuple[Tensor, int]:
        """Loss and terms of a few rows of a batch; of all where it has none of some."""
        try:
            return self._row_loss(planning.sample_of(batch))
        except FlatbenchError:
            return self._row_loss(batch)

    def _half_computed(self) -> set[torch.dtype]:
        """The types of half precision in which the loss computes, whatever the model's is: by autocast."""
        with torch.no_grad(), types_computed(arithmetic=True) as found:
            self._sampled(self.batches[0])
        return found.intersection(HALF)

    def _check_open(self) -> None:
        """Raise InputError where gradients were switched off or a batch was written to since the opening."""
        names = [n for n, p in zip(self.shapes, self._parameters, strict=True) if not p.requires_grad]
        if names:
            raise InputError(
                f"requires_grad of {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} was "
                "switched off while the operator was open: by requires_grad_(False), or by another operator "
                "or measure of this model that is open inside; close that one first"
            )
        if cutting.versions(self.batches) != self._versions:
            raise InputError(
                "a batch was written to while the operator was open; give copies, or make another one"
            )

    def loss_of(self, rows: Any) -> float:
        """The mean loss of some rows, which need not be of the batches; NaN where they have no terms."""
        with torch.no_grad():
            loss, terms = self._row_loss(rows)
        return float(loss) if terms else math.nan

    def _strip_padding(self, batch: Any) -> list[Any]:
        """The batch without padding, if a comparison on a few rows finds the same loss."""
        pieces = planning.without_padding(batch) if self._shorten else [batch]
        if len(pieces) == 1 and pieces[0] is batch:
            return [batch]
        # by the lengths at which the batch is cut: of fewer rows another cutting would be the best
        try:
            alike = all(self._same_loss([cut], [padded]) for cut, padded in planning.cut_and_padded(batch))
        except InputError:  # something has the width of the padded batch that is not known to have it
            alike = False
        if not alike or (len(pieces) > 1 and not self._parts_are_alike(batch, pieces)):
            if not self._told_padding:  # once, however many batches there are
                log.info("padding is kept: the loss depends on it")
            self._told_padding = True
            return [batch]
        return pieces

    def _parts_are_alike(self, batch: Any, pieces: Sequence[Any]) -> bool:
        """Whether a batch's loss is the mean of its parts', and of these where memory is no question."""
        return self._additive([batch]) and (self.memory is not None or self._same_loss([batch], pieces))

    def _additive(self, whole: Sequence[Any]) -> bool:
        """Whether a batch's loss is the mean of its parts' losses.

        Compared on a few of its rows; where nobody told its terms, on all, a few at a time, and on rows of
        two batches together: weights of rare classes show where these are, and nowhere else.
        """
        samples = [planning.sample_of(batch) for batch in whole]
        if self._without_terms or self._own_loss:
            for batch in whole:
                samples += planning.split(batch, math.ceil(cutting.rows(batch) / _FEW))
            samples += planning.across(whole)
        return all(self._same_loss([sample], planning.split(sample, 2)) for sample in samples)

    def _check_loss(self) -> None:
        """Raise InputError for a loss that is random, a sum, or no mean over what it should be the mean of.

        A loss that tells its terms may depend on rows together, as contrastive losses do: what it tells is
        taken for true, unless it is plainly the sum over its terms. Batches that cannot be cut into rows are
        taken whole.
        """
        told = not (self._without_terms or self._own_loss)
        whole = [cutting.to_device(batch, self.device) for batch in self.batches]
        try:
            sample = planning.sample_of(whole[0])
            again = self._same_loss([sample], [sample])
            mean = told or (len(whole) == 1 and not self.is_part) or self._additive(whole)
            summed = told and self._is_sum(sample)
        except (InputError, FlatbenchError):
            return
        if summed:
            raise InputError(
                "the loss of a few rows is the sum of the losses of their halves: it is a sum over terms, "
                "and (mean loss, number of terms) is what must be returned; divide it by the number"
            )
        if not again:
            raise InputError(
                "the loss is random: two passes over the same rows give different values; take dropout and "
                "noise out of it (layers such as nn.Dropout are switched off by themselves)"
            )
        if not mean and self._own_loss:
            raise InputError(
                "the model's own loss is not the mean over its labels that are not -100 (weights of classes, "
                "a sum, an auxiliary term), and there are several batches: give loss=, which returns (mean "
                "loss, number of terms that it is the mean of)"
            )
        if not mean:
            raise InputError(
                "the loss of a batch is not the mean over its rows, and there are several batches: return "
                "(mean loss, number of terms that it is the mean of) instead of the loss alone"
            )

    def _is_sum(self, sample: Any) -> bool:
        """Whether the loss of some rows is that of their halves added up, and not their mean."""
        halves = planning.split(sample, 2)
        if len(halves) < 2:
            return False
        with torch.no_grad():
            (whole, _), *parts = (self._evaluate(piece) for piece in (sample, *halves))
        mean, found, kind = self._mean(parts), [float(loss) for loss, _ in parts], whole.dtype
        if mean is None or not all(loss > 0 for loss in found):
            return False
        return self._near(float(whole), sum(found), kind) and not self._near(float(whole), mean, kind)

    def _same_loss(self, one: Sequence[Any], other: Sequence[Any]) -> bool:
        with torch.no_grad():
            seen = [[self._evaluate(piece) for piece in part] for part in (one, other)]
        first, second = map(self._mean, seen)
        if first is None or second is None:
            return first is second
        if len({sum(terms for _, terms in part) for part in seen}) > 1:
            return False
        return self._near(first, second, seen[0][0][0].dtype)

    def _near(self, one: float, other: float, kind: torch.dtype) -> bool:
        """Whether two losses of a type differ by rounding alone."""
        eps = max(torch.finfo(found).eps for found in (kind, *(p.dtype for p in self._parameters)))
        return bool(abs(one - other) <= 4 * eps**0.8 * (abs(one) + eps**0.2))

    @staticmethod
    def _mean(seen: Sequence[tuple[Tensor, int]]) -> float | None:
        total = sum(terms for _, terms in seen)
        return sum(float(loss) * terms for loss, terms in seen if terms) / total if total else None
