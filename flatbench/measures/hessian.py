"""Largest eigenvalues of the training loss's Hessian: the curvature that "flat minimum" is about."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from flatbench.curvature.eigenpairs import ConvergenceWarning, Eigenpairs, Interrupted
from flatbench.curvature.hessian import HessianOperator
from flatbench.curvature.lanczos import top_eigenpairs
from flatbench.curvature.loss_operator import Products, lacks_second_derivative
from flatbench.curvature.ritz import Which
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import Measure, MeasureInterrupted, Subject
from flatbench.measures.objective import Objective, norm
from flatbench.measures.options import checked
from flatbench.measures.spaces import Point, Space, in_space
from flatbench.seeding import derive_seed


class Hessian(Measure):
    """Largest eigenvalues of the loss's Hessian, each with the error that it may have.

    The Hessian is that of the exact mean loss over the examples, at the trained point, in evaluation mode.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        k: how many eigenvalues.
        tol: relative error allowed of an eigenvalue. PyHessian stops when an eigenvalue changes by less than
            this in one iteration, which says little about its error.
        which: largest (``LA``), smallest (``SA``) or largest in magnitude (``LM``), at a saddle perhaps a
            negative one; PyHessian knows ``LM`` only. ``LA``, with PyHessian ``LM``, if None.
        engine: ``lanczos``, or ``pyhessian`` for its power iteration.
        verify: guard against repeated eigenvalues, for some more products (Lanczos).
        products: ``exact`` second derivatives, central ``differences`` of gradients, or ``auto`` (Lanczos).
        memory: budget in bytes; half of what is available if None (Lanczos).
        max_iterations: limit of Hessian-vector products per eigenvalue.
        examples: use only the first that many training examples; None for all.
    """

    def __init__(
        self,
        *,
        space: Space = "merged",
        k: Annotated[int, Field(ge=1)] = 1,
        tol: Annotated[float, Field(gt=0, lt=1)] = 1e-3,
        which: Which | None = None,
        engine: Literal["lanczos", "pyhessian"] = "lanczos",
        verify: bool = True,
        products: Products = "auto",
        memory: Annotated[int, Field(ge=1)] | None = None,
        max_iterations: Annotated[int, Field(ge=2)] = 100,
        examples: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        checked(
            Hessian,
            space=space,
            k=k,
            tol=tol,
            which=which,
            engine=engine,
            verify=verify,
            products=products,
            memory=memory,
            max_iterations=max_iterations,
            examples=examples,
        )
        which = which or ("LM" if engine == "pyhessian" else "LA")
        if engine == "pyhessian" and (which != "LM" or products != "auto"):
            raise InputError(
                "Hessian: engine: pyhessian finds eigenvalues of largest magnitude by exact products"
            )
        self.space, self.k, self.tol, self.engine = space, k, tol, engine
        self.which: Which = which
        self.verify, self.products, self.memory = verify, products, memory
        self.max_iterations, self.examples = max_iterations, examples

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``eigenvalue_i`` (``λ_i``, a Rayleigh quotient), ``error_i`` (its estimated error, at most
            ``residual_i``), ``residual_i`` (``‖Hv_i − λ_i v_i‖₂``: an eigenvalue lies within it of ``λ_i``)
            and ``relative_error_bound_i`` (``error_i / |λ_i|``, None for a zero) for i = 1…k; ``which``;
            ``converged`` (all errors are within ``tol``), ``settled`` (PyHessian's rule was met before the
            limit of iterations, a much weaker thing), ``verified`` (a fresh search met nothing larger);
            ``loss`` and ``gradient_norm`` at the point; ``method`` (how products were made), ``graph``,
            ``memory_bytes`` (stated peak), ``products``, ``seconds``, ``examples``, ``space``, ``dimension``,
            ``precision``, ``engine``.

        Raises:
            InputError: ``k`` is larger than the space's dimension, or there are no examples.
            NotApplicableError: the model has no such space, or no second derivatives.
            FlatbenchError: the loss or a product is not finite.
            MeasureInterrupted: Ctrl-C after something had converged.
        """
        start = time.perf_counter()
        with in_space(subject, self.space, twice_differentiable=self.products != "differences") as point:
            if self.k > point.dimension:
                raise InputError(f"k: {self.k} eigenvalues wanted of a {point.dimension}-dimensional space")
            objective = Objective(subject, point, self.examples)
            seed = derive_seed(subject.seed, "hessian")
            run = self._by_pyhessian if self.engine == "pyhessian" else self._by_lanczos
            interrupted = False
            try:
                found, extra = run(subject, point, objective, seed)
            except _Partial as partial:
                if not partial.found.values:
                    raise KeyboardInterrupt from partial
                found, extra, interrupted = partial.found, partial.extra, True
            values = {
                **_numbered(found),
                "converged": all(found.converged),
                "settled": all(found.settled),
                "verified": found.verified,
                "which": self.which,
                **extra,
                "products": found.products,
                "seconds": time.perf_counter() - start,
                "examples": objective.examples,
                **point.describe(),
            }
        if interrupted:
            raise MeasureInterrupted(values)
        return values

    def _by_lanczos(
        self, subject: Subject, point: Point, objective: Objective, seed: int
    ) -> tuple[Eigenpairs, dict[str, Any]]:
        operator = HessianOperator(
            point.model,
            subject.loss,
            objective.batches,
            space=point.parameters,
            products=self.products,
            memory=self.memory,
        )
        with _derivatives(), operator, warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result says it
            loss, gradient = operator.point()
            extra: dict[str, Any] = {"loss": loss, "gradient_norm": float(gradient.double().norm())}
            try:
                found = top_eigenpairs(
                    operator,
                    self.k,
                    tol=self.tol,
                    which=self.which,
                    verify=self.verify,
                    max_products=self.max_iterations * self.k,
                    seed=seed % 2**62,
                )
            except Interrupted as partial:
                extra |= _cost(operator)
                raise _Partial(partial.found, extra) from partial
            return found, extra | _cost(operator)

    def _by_pyhessian(
        self, subject: Subject, point: Point, objective: Objective, seed: int
    ) -> tuple[Eigenpairs, dict[str, Any]]:
        from flatbench.curvature.pyhessian_engine import PyHessianEngine

        engine = PyHessianEngine()
        loss, gradient = objective.gradient()
        with _derivatives():
            found = engine.top(
                objective.mean_loss(), k=self.k, tol=self.tol, max_iterations=self.max_iterations, seed=seed
            )
        if not all(map(math.isfinite, (*found.values, *found.residuals))):
            raise FlatbenchError(f"the Hessian's eigenvalues are not finite: {found.values}")
        return found, {
            "loss": loss,
            "gradient_norm": norm(gradient),
            "method": "double backward",
            "graph": "rebuilt",
            "memory_bytes": None,
            "engine": engine.name,
        }


class _Partial(Exception):  # noqa: N818 - no error
    """What an interrupted search had found."""

    def __init__(self, found: Eigenpairs, extra: dict[str, Any]) -> None:
        super().__init__()
        self.found, self.extra = found, extra


@contextlib.contextmanager
def _derivatives() -> Iterator[None]:
    """Turns torch's complaint about a missing derivative into the reason why the measure does not apply."""
    try:
        yield
    except ArithmeticError as error:
        raise FlatbenchError(str(error)) from error
    except RuntimeError as error:
        if not lacks_second_derivative(error):
            raise
        raise NotApplicableError(f"the loss has no second derivative: {error}") from error


def _cost(operator: HessianOperator) -> dict[str, Any]:
    plan = operator.plan
    return {
        "method": plan.method,
        "graph": plan.graph,
        "memory_bytes": plan.peak_bytes,
        "engine": "lanczos",
    }


def _numbered(found: Eigenpairs) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for i, (value, error, residual) in enumerate(
        zip(found.values, found.errors, found.residuals, strict=True), start=1
    ):
        values[f"eigenvalue_{i}"] = value
        values[f"error_{i}"] = error
        values[f"residual_{i}"] = residual
        values[f"relative_error_bound_{i}"] = error / abs(value) if value else None
    return values
