"""Balancedness of LoRA's factors: the difference of their norms, on which regularisers act."""

from __future__ import annotations

from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

from flatbench.curvature.operators.offloaded import within_reach
from flatbench.errors import NotApplicableError
from flatbench.measures.base import Measure, Track
from flatbench.measures.options import checked
from flatbench.models import factors
from flatbench.subject.objective import norm
from flatbench.subject.subject import Subject


class Balancedness(Measure):
    """Balancedness of LoRA's factors, ``‖B‖² − ‖A‖²`` (Frobenius norms), layer by layer.

    Gradient flow keeps ``BᵀB − AAᵀ``, so that the balancedness stays where it began; SAM and weight decay
    drive it towards zero (arXiv 2410.14802, which calls half of it so; the figure of arXiv 2508.00522 shows
    it over training).

    Args:
        every: also measure after every that many epochs of training, into the run's history.
    """

    def __init__(self, *, every: Annotated[int, Field(ge=1)] | None = None) -> None:
        checked(Balancedness, every=every)
        self.every = every

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``balancedness`` (mean over the adapted layers of ``‖B‖² − ‖A‖²``), ``imbalance`` (mean of
            ``|‖B‖² − ‖A‖²| / (‖B‖² + ‖A‖²)``, from 0, balanced, to 1, one factor is zero),
            ``balancedness_by_layer`` and ``layers`` (lists in the model's order).

        Raises NotApplicableError if the model has no LoRA adapter.
        """
        trained = [p for p in subject.model.parameters() if p.requires_grad]
        with within_reach(subject.model, trained):
            norms = [
                (factor.name, norm([factor.B.detach()]) ** 2, norm([factor.A.detach()]) ** 2)
                for factor in factors.measured_factors(subject.model)
            ]
        if not norms:
            raise NotApplicableError("the model has no adapter")
        # both factors zero: perfectly balanced
        relative = [abs(b - a) / (b + a) if b + a else 0.0 for _, b, a in norms]
        return {
            "balancedness": fmean(b - a for _, b, a in norms),
            "imbalance": fmean(relative),
            "balancedness_by_layer": [b - a for _, b, a in norms],
            "layers": [name for name, _, _ in norms],
        }

    def during(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Measure a model in training: ``layer_1``, ``layer_2``, … beside, the balancedness of each layer."""
        found = self(subject)
        layers = enumerate(found["balancedness_by_layer"], start=1)
        return {**found, **{f"layer_{number}": value for number, value in layers}}
