"""How far EFlat-LoRA's averaged perturbation is from the one that it stands for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from flatbench.errors import NotApplicableError
from flatbench.measures.base import Measure
from flatbench.measures.options import checked
from flatbench.optim.eflat_lora import EFlatLoRA
from flatbench.subject.objective import Objective
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import Subject


class EMAGap(Measure):
    """EMA sharpness less SAM sharpness of a model that EFlat-LoRA is training.

    EFlat-LoRA takes its gradient at ``B + Ê``, with a moving average of perturbations, and Flat-LoRA at
    ``B + E``, E from the gradient at B itself. With the loss L over the first training examples,
    ``EMA sharpness = L(B + Ê) − L(B)``, ``SAM sharpness = L(B + E) − L(B)`` with E of that loss's gradient
    (arXiv 2508.00522, Eq. 10 to Eq. 15, at the radius of the next step), and the gap is their difference. The
    paper's figure shows it over training, falling towards 0; on how many examples it was taken there is not
    known here.

    Taken during training alone, at the unperturbed point: Ê is the optimizer's, which is gone afterwards.

    Args:
        examples: the first that many training examples.
        every: measure after every that many epochs of training, into the run's history.
    """

    def __init__(
        self,
        *,
        examples: Annotated[int, Field(ge=1)] = 1024,
        every: Annotated[int, Field(ge=1)] = 1,
    ) -> None:
        checked(EMAGap, examples=examples, every=every)
        self.examples, self.every = examples, every

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``ema_sharpness``, ``sam_sharpness``, ``gap`` (the first less the second), ``loss`` (at the
            unperturbed point), ``average_norm`` (of Ê in the full space), ``rho``, ``examples``, ``seconds``.

        Raises:
            NotApplicableError: nothing trains the model now, or another method than EFlat-LoRA, or it has not
                made a step.
            FlatbenchError: a loss is not finite.
        """
        start = time.perf_counter()
        optimizer = subject.optimizer
        if optimizer is None:
            raise NotApplicableError("it is taken during training, with what the optimizer keeps")
        if not isinstance(optimizer, EFlatLoRA):
            raise NotApplicableError(f"{type(optimizer).__name__} keeps no average of perturbations")
        average = optimizer.average_perturbation()
        if average is None:
            raise NotApplicableError("no step was made yet, so that there is no average of perturbations")
        with in_space(subject, "adapter") as point:
            objective = Objective(subject, point, self.examples)
            loss, gradient = objective.gradient()
            for parameter, part in zip(point.parameters.values(), gradient, strict=True):
                parameter.grad = part.to(parameter.dtype)  # put back on the way out
            fresh = optimizer.fresh_perturbation()
            ema, sam = (
                self._loss_at(point, objective, optimizer.full_space.weights, values) - loss
                for values in (average, fresh)
            )
        return {
            "ema_sharpness": ema,
            "sam_sharpness": sam,
            "gap": ema - sam,
            "loss": loss,
            "average_norm": float(optimizer.perturbation_norm),
            "rho": optimizer.next_radius(),
            "examples": objective.examples,
            "seconds": time.perf_counter() - start,
        }

    @staticmethod
    def _loss_at(
        point: Point, objective: Objective, weights: Sequence[Tensor], values: Sequence[Tensor]
    ) -> float:
        """The loss with ``values`` added to ``weights``."""
        added = {id(weight): value for weight, value in zip(weights, values, strict=True)}
        moved = [added.get(id(p), torch.zeros_like(p)) for p in point.parameters.values()]
        with point.moved(moved):
            return objective.value()
