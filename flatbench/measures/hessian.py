"""Largest eigenvalues of the training loss's Hessian: the curvature that "flat minimum" is about."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any

from pydantic import Field

from flatbench.curvature.eigenpairs import EigenEngine, Eigenpairs, MeanLoss
from flatbench.curvature.pyhessian_engine import PyHessianEngine
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import Measure, Subject
from flatbench.measures.objective import Objective, norm
from flatbench.measures.options import checked
from flatbench.measures.spaces import Space, in_space
from flatbench.seeding import derive_seed


class Hessian(Measure):
    """Largest eigenvalues of the loss's Hessian, by PyHessian's power iteration, each with an error bound.

    The Hessian is that of the exact mean loss over the examples, at the trained point, in evaluation mode;
    eigenvalues are those largest in magnitude.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        k: how many eigenvalues.
        tol: PyHessian stops when an eigenvalue changes by less than this, relatively, in one iteration.
        max_iterations: limit of Hessian-vector products per eigenvalue.
        examples: use only the first that many training examples; None for all.
    """

    def __init__(
        self,
        *,
        space: Space = "merged",
        k: Annotated[int, Field(ge=1)] = 1,
        tol: Annotated[float, Field(gt=0, lt=1)] = 1e-3,
        max_iterations: Annotated[int, Field(ge=2)] = 100,
        examples: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        checked(Hessian, space=space, k=k, tol=tol, max_iterations=max_iterations, examples=examples)
        self.space, self.k, self.tol = space, k, tol
        self.max_iterations, self.examples = max_iterations, examples
        self.engine: EigenEngine = PyHessianEngine()

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``eigenvalue_i`` (``λ_i``, a Rayleigh quotient), ``residual_i`` (``‖Hv_i − λ_i v_i‖₂``: an
            eigenvalue lies within it of ``λ_i``) and ``relative_error_bound_i`` (``residual_i / |λ_i|``, None
            for a zero) for i = 1…k; ``converged`` (all bounds are within ``tol``), ``settled`` (PyHessian's
            rule was met before the limit of iterations, a much weaker thing); ``loss`` and
            ``gradient_norm`` at the point; ``products``, ``seconds``, ``examples``, ``space``, ``dimension``,
            ``precision``, ``engine``.

        Raises:
            InputError: ``k`` is larger than the space's dimension, or there are no examples.
            NotApplicableError: the model has no such space, or no second derivatives.
            FlatbenchError: the loss or a product is not finite.
        """
        start = time.perf_counter()
        with in_space(subject, self.space, twice_differentiable=True) as point:
            if self.k > point.dimension:
                raise InputError(f"k: {self.k} eigenvalues wanted of a {point.dimension}-dimensional space")
            objective = Objective(subject, point, self.examples)
            loss, gradient = objective.gradient()
            found = self._eigenpairs(objective.mean_loss(), derive_seed(subject.seed, "hessian"))
            return {
                **_numbered(found),
                "converged": all(found.converged),
                "settled": all(found.settled),
                "loss": loss,
                "gradient_norm": norm(gradient),
                "products": found.products,
                "seconds": time.perf_counter() - start,
                "examples": objective.examples,
                **point.describe(),
                "engine": self.engine.name,
            }

    def _eigenpairs(self, loss: MeanLoss, seed: int) -> Eigenpairs:
        try:
            found = self.engine.top(
                loss, k=self.k, tol=self.tol, max_iterations=self.max_iterations, seed=seed
            )
        except ArithmeticError as error:
            raise FlatbenchError(str(error)) from error
        except RuntimeError as error:
            if "derivative for" in str(error):  # torch: "derivative for … is not implemented"
                raise NotApplicableError(f"the loss has no second derivative: {error}") from error
            raise
        if not all(map(math.isfinite, (*found.values, *found.residuals))):
            raise FlatbenchError(f"the Hessian's eigenvalues are not finite: {found.values}")
        return found


def _numbered(found: Eigenpairs) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for i, (value, residual) in enumerate(zip(found.values, found.residuals, strict=True), start=1):
        values[f"eigenvalue_{i}"] = value
        values[f"residual_{i}"] = residual
        values[f"relative_error_bound_{i}"] = residual / abs(value) if value else None
    return values
