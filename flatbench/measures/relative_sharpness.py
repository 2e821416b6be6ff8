"""Relative critical sharpness: how far an update may go before it raises another loss (forgetting)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import peft
import torch
from pydantic import Field
from torch import Tensor, nn

from flatbench.config.registry import LATER
from flatbench.curvature.operators.losses import losses_in_float32
from flatbench.curvature.operators.model_state import as_found
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.labels import IGNORED
from flatbench.measures.base import Track
from flatbench.measures.critical_sharpness import PASSES, TOLERANCE, CriticalSharpness
from flatbench.measures.updates import Direction, Rho, state_of, update_of
from flatbench.subject.objective import Objective, first_examples, norm, rows
from flatbench.subject.spaces import in_space
from flatbench.subject.subject import Subject

#: key under which a batch holds the base model's probabilities
_BASE = "base_probabilities"
#: most that these may take
_MOST_BYTES = 2 * 2**30


class RelativeCriticalSharpness(CriticalSharpness):
    """Relative critical sharpness: 2/η_c, with η_c the smallest training step that raises another loss.

    arXiv 2601.16979: ``λ_c^{1→2}``, Δ the update of loss 1, here that of the training examples, and
    ``η_c = min{η > 0 : L₂(θ − η·Δ) > L₂(θ)}``. With ``base``, L₂ is the cross entropy of the model's
    predictions to those of its base model (the adapter switched off) on the same examples: a step that raises
    it moves away from the base, which is forgetting. A head that was trained beside the adapter is, in the
    base, the one it began from.

    Args:
        against: what L₂ is of: ``base``, or the name of other data that there is (``validation`` in a study,
            another split of a checkpoint, ``--other`` of `flatbench measure`).
        space: as of `CriticalSharpness`, and so are direction, rho, examples (of each loss), tolerance,
            passes, every and precision.
    """

    def __init__(
        self,
        *,
        against: Annotated[str, Field(min_length=1)] = "base",
        space: NamedSpace = "merged",
        direction: Direction = "gradient",
        rho: Rho = 0.05,
        examples: Annotated[int, Field(ge=1)] = 1024,
        tolerance: Annotated[float, Field(gt=0, lt=1)] = TOLERANCE,
        passes: Annotated[int, Field(ge=3)] = PASSES,
        every: Annotated[int, Field(ge=1)] | None = None,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        super().__init__(
            space=space,
            direction=direction,
            rho=rho,
            examples=examples,
            tolerance=tolerance,
            passes=passes,
            every=every,
            precision=precision,
        )
        self.against = against

    def during(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Measure, beginning with the step at which an earlier measurement ended.

        Returns:
            What `CriticalSharpness` gives, of L₂, the value as ``relative_critical_sharpness``; ``against``,
            and ``other_examples`` (of L₂). ``slope`` is None: it is not known without a gradient of L₂.

        Raises NotApplicableError as well where there is no such data, or no adapter to switch off.
        """
        start = time.perf_counter()
        state = state_of(subject, self.direction)
        other = self._of_base(subject) if self.against == "base" else self._of_data(subject)
        with in_space(subject, self.space, precision=self.precision) as point:
            first = Objective(subject, point, self.examples)
            update = replace(update_of(point, first, self.direction, state, self.rho), slope=None)
            second = Objective(other, point, self.examples)
            every = subject.batches if self.against == "base" else other.batches
            share = second.examples / sum(map(rows, every))
            found = self._along(other, point, second, update, track, share)
            return {
                "relative_critical_sharpness": found.pop("critical_sharpness"),
                **found,
                "against": self.against,
                "direction": self.direction,
                "moments": update.moments,
                "direction_norm": norm(update.parts),
                "gradients": update.gradients,
                "examples": first.examples,
                "other_examples": second.examples,
                "seconds": time.perf_counter() - start,
                **point.describe(),
            }

    def _of_data(self, subject: Subject) -> Subject:
        if self.against not in subject.others:
            there = ", ".join(subject.others)
            raise NotApplicableError(
                f"there is no other data called '{self.against}'" + (f"; there is {there}" if there else "")
            )
        return replace(subject, batches=subject.others[self.against]())

    def _of_base(self, subject: Subject) -> Subject:
        """The same examples with the base model's predictions of them."""
        model: Any = subject.model
        if not isinstance(model, peft.PeftModel):
            raise NotApplicableError("the model has no adapter that could be switched off to get its base")
        batches = []
        taken = first_examples(subject.batches, self.examples)
        with as_found(model), torch.no_grad(), model.disable_adapter():
            size = 0
            for batch in taken:
                logits = _logits(model, batch)
                size += logits.numel() * 4
                if size > _MOST_BYTES:
                    raise InputError(
                        f"the base model's predictions of {sum(map(rows, taken))} examples take more than "
                        f"{_MOST_BYTES >> 30} GiB; give fewer examples"
                    )
                batches.append({**batch, _BASE: torch.softmax(_float(logits), dim=-1)})
        return replace(subject, batches=batches, loss=_cross_entropy)


def _cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """Mean cross entropy to the base's predictions over rows or tokens, and how many these are."""
    wanted = batch[_BASE]
    given = {key: value for key, value in batch.items() if key != _BASE}
    with losses_in_float32(model):
        log = torch.log_softmax(_float(_logits(model, given)), dim=-1)
    terms = -(wanted.to(log) * log).sum(dim=-1)
    if terms.ndim == 1:
        return terms.mean(), len(terms)
    shown = _token_mask(given, terms.shape).to(terms)
    return (terms * shown).sum() / shown.sum().clamp_min(1), int(shown.sum())


def _float(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _token_mask(batch: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
    """Which tokens are no padding."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if mask is not None and tuple(mask.shape) == tuple(shape):
        return mask != 0
    if labels is not None and tuple(labels.shape) == tuple(shape):
        return labels != IGNORED
    return torch.ones(tuple(shape), dtype=torch.bool)


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    output = model(**batch)
    held = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(held, Tensor) or held.ndim not in (2, 3):
        raise NotApplicableError("the model gives no logits of classes or tokens to compare with its base's")
    if not bool(torch.isfinite(held).all()):
        raise FlatbenchError("the logits hold nan or infinite numbers")
    return held
