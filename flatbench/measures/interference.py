"""Effect of perturbations of A and B on the merged weights: LoRA-SAM's three terms, Flat-LoRA, EFlat-LoRA."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from flatbench.curvature.operators.adapters import refuse_detached, weight_key
from flatbench.curvature.operators.spaces import plain_name
from flatbench.errors import NotApplicableError
from flatbench.measures.base import Measure
from flatbench.measures.options import checked
from flatbench.models.factors import LoRAFactors, measured_factors
from flatbench.optim.base.full_space import FullSpace
from flatbench.optim.eflat_lora import EFlatLoRA
from flatbench.subject.objective import Objective, norm
from flatbench.subject.spaces import Point, in_space
from flatbench.subject.subject import Subject

#: a perturbation of the merged weights: one tensor a weight, by the weight's name
Moves = Mapping[str, Tensor]


class Interference(Measure):
    """Perturbations that methods make in A and B, as they arrive in the merged weights, against the full one.

    LoRA-SAM moves both factors along their gradients, ``E_A = rho·g_A/‖g‖``, ``E_B = rho·g_B/‖g‖``, so that
    ``W = W0 + s·B·A`` moves by three terms, ``s·B·E_A + s·E_B·A + s·E_B·E_A``; arXiv 2508.00522 calls that
    interference, and has Flat-LoRA and EFlat-LoRA move B alone. Each perturbation and each term is told by
    its norm in the merged weights, by its cosine with the gradient G of the loss there, and by the rise of
    the loss when it is scaled to the norm rho: how good a direction it is, whatever its length.

    The loss is that over the same examples for all. Perturbed are A and B alone, at the norm rho of both
    together; what else trains, such as a new head, stays.

    Args:
        rho: radius of the perturbations, and the norm to which they are scaled for the rise.
        examples: the first that many training examples.
        every: also measure after every that many epochs of training, into the run's history; EFlat-LoRA's
            average is the optimizer's, and there during its training alone.
    """

    def __init__(
        self,
        *,
        rho: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05,
        examples: Annotated[int, Field(ge=1)] = 256,
        every: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        checked(Interference, rho=rho, examples=examples, every=every)
        self.rho, self.examples, self.every = rho, examples, every

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            For each NAME of ``full`` (``rho·G/‖G‖``), ``sam``, its terms ``sam_A`` (``s·B·E_A``), ``sam_B``
            (``s·E_B·A``) and ``sam_cross`` (``s·E_B·E_A``), ``sam_linear`` (the first two), ``flat_lora``
            and, while EFlat-LoRA trains the model, ``eflat_lora``: ``NAME_norm`` (Frobenius norm of all
            merged weights together), ``NAME_share`` (that over rho), ``NAME_cosine`` (with G), ``NAME_rise``
            (of the loss, at the norm rho); the last two are None where the perturbation is zero. ``loss``,
            ``gradient_norm`` (of G), ``rho``, ``examples``, ``seconds``, ``space``, ``dimension``,
            ``precision``.

        Raises:
            NotApplicableError: the model has no LoRA adapter, or one whose weight is no ``W0 + s·B·A``.
            FlatbenchError: a loss is not finite.
        """
        start = time.perf_counter()
        factors = measured_factors(subject.model)
        if not factors:
            raise NotApplicableError("the model has no adapter")
        refuse_detached(subject.model, [factor.A for factor in factors])
        perturbations = self._perturbations(subject)
        with in_space(subject, "merged") as point:
            objective = Objective(subject, point, self.examples)
            loss, gradient = objective.gradient()
            G = dict(zip(point.parameters, gradient, strict=True))
            length = norm(gradient)
            if length:
                perturbations["full"] = {name: part * (self.rho / length) for name, part in G.items()}
            found: dict[str, Any] = {}
            for name, moves in perturbations.items():
                found |= self._describe(name, moves, G, point, objective, loss)
            found |= {"loss": loss, "gradient_norm": length, "rho": self.rho, "examples": objective.examples}
            return {**found, "seconds": time.perf_counter() - start, **point.describe()}

    def _perturbations(self, subject: Subject) -> dict[str, Moves]:
        """What each method does to the merged weights."""
        with in_space(subject, "adapter") as point:
            factors = measured_factors(point.model)  # inside: weights on a disk are brought for the time
            gradient = Objective(subject, point, self.examples).gradient()[1]
            of = {id(p): part for p, part in zip(point.parameters.values(), gradient, strict=True)}
            scale = self.rho / norm(gradient) if norm(gradient) else 0.0
            E_A = [of.get(id(f.A), torch.zeros_like(f.A)) * scale for f in factors]
            E_B = [of.get(id(f.B), torch.zeros_like(f.B)) * scale for f in factors]
            for parameter, part in zip(point.parameters.values(), gradient, strict=True):
                parameter.grad = part.to(parameter.dtype)  # put back on the way out
            flat = FullSpace(subject.model, "interference")
            values, _ = flat.perturbation(self.rho, "average", "global")
            A, B = [f.A.detach() for f in factors], [f.B.detach() for f in factors]
            terms: dict[str, Moves] = {
                "sam_A": _products(factors, B, E_A),
                "sam_B": _products(factors, E_B, A),
                "sam_cross": _products(factors, E_B, E_A),
            }
            linear = _sum(terms["sam_A"], terms["sam_B"])
            found: dict[str, Moves] = {"sam": _sum(linear, terms["sam_cross"]), **terms, "sam_linear": linear}
            found["flat_lora"] = _moved_weights(factors, flat, values)
            average = None
            if isinstance(subject.optimizer, EFlatLoRA):
                average = subject.optimizer.average_perturbation()
            if average is not None:
                found["eflat_lora"] = _moved_weights(factors, subject.optimizer.full_space, average)
            return found

    def _describe(
        self, name: str, moves: Moves, G: Moves, point: Point, objective: Objective, loss: float
    ) -> dict[str, Any]:
        """Norm, share of rho, cosine with G and rise at the norm rho."""
        size = norm(list(moves.values()))
        slope = norm(list(G.values()))
        cosine = rise = None
        if size and slope:
            inner = sum(float((G[key].double() * part.double()).sum()) for key, part in moves.items())
            cosine = inner / (size * slope)
        if size:
            step = [
                moves[key].to(p) if key in moves else torch.zeros_like(p)
                for key, p in point.parameters.items()
            ]
            with point.moved(step, self.rho / size):
                rise = objective.value() - loss
        told = {"norm": size, "share": size / self.rho, "cosine": cosine, "rise": rise}
        return {f"{name}_{key}": value for key, value in told.items()}


def _products(factors: Sequence[LoRAFactors], B: Sequence[Tensor], A: Sequence[Tensor]) -> dict[str, Tensor]:
    """``s·B·A`` of each adapted weight, in the shape in which the weight is stored."""
    found: dict[str, Tensor] = {}
    with _holding(factors, B, A), torch.no_grad():
        for factor in factors:
            name = f"{plain_name(factor.name)}.{weight_key(factor.layer)}"
            layer: Any = factor.layer
            product = layer.get_delta_weight(factor.adapter).detach().clone()
            found[name] = found[name] + product if name in found else product
    return found


@contextlib.contextmanager
def _holding(factors: Sequence[LoRAFactors], B: Sequence[Tensor], A: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the factors hold these values; afterwards the bits of before."""
    parameters = [p for factor in factors for p in (factor.B, factor.A)]
    values = [value for pair in zip(B, A, strict=True) for value in pair]
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, saved, strict=True):
                parameter.copy_(old)


def _moved_weights(
    factors: Sequence[LoRAFactors], space: FullSpace, values: Sequence[Tensor]
) -> dict[str, Tensor]:
    """What a perturbation of one factor of each layer does to the merged weights."""
    moves = {id(weight): value for weight, value in zip(space.weights, values, strict=True)}
    by_factor: dict[str, tuple[list[Tensor], list[Tensor], list[LoRAFactors]]] = {
        "B": ([], [], []),
        "A": ([], [], []),
    }
    for factor in factors:
        letter = "B" if id(factor.B) in moves else "A"
        B, A, own = by_factor[letter]
        B.append(moves[id(factor.B)] if letter == "B" else factor.B.detach())
        A.append(moves[id(factor.A)] if letter == "A" else factor.A.detach())
        own.append(factor)
    parts = [_products(own, B, A) for B, A, own in by_factor.values() if own]
    return parts[0] if len(parts) == 1 else _sum(*parts)


def _sum(first: Moves, second: Moves) -> dict[str, Tensor]:
    found = dict(first)
    for name, part in second.items():
        found[name] = found[name] + part if name in found else part
    return found
