"""Largest eigenvalues of the training loss's Hessian: the curvature that "flat minimum" is about."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from flatbench.config.registry import LATER
from flatbench.curvature.eigenpairs.lanczos import top_eigenpairs
from flatbench.curvature.eigenpairs.result import ConvergenceWarning, Eigenpairs, Interrupted
from flatbench.curvature.eigenpairs.ritz import Which
from flatbench.curvature.operators.gauss_newton import GaussNewtonOperator
from flatbench.curvature.operators.graphs import lacks_second_derivative
from flatbench.curvature.operators.hessian import HessianOperator
from flatbench.curvature.operators.loss_operator import LossOperator
from flatbench.curvature.operators.planned import Products
from flatbench.curvature.operators.precision import UNITS, Precision, half_types, unit_of_half, why_coarse
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.errors import FlatbenchError, InputError, NotApplicableError
from flatbench.measures.base import Measure, MeasureInterrupted, Track
from flatbench.measures.gauge import balanced
from flatbench.measures.options import checked
from flatbench.measures.sampling import (
    BUDGET,
    INTERVAL,
    PRODUCT,
    Batches,
    Sampling,
    Taken,
    measured,
    of_eigenvalues,
)
from flatbench.seeding import derive_seed
from flatbench.subject.objective import Objective, norm, rows
from flatbench.subject.rounding import stated
from flatbench.subject.spaces import Point, in_space, refuse_rounded_inputs
from flatbench.subject.subject import Subject

#: the smallest tolerance that is chosen for an eigenvalue
FINEST = 1e-3


class Hessian(Measure):
    """Largest eigenvalues of the loss's Hessian, each with the error that it may have.

    The Hessian is that of the exact mean loss over the examples, at the trained point, in evaluation mode.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        k: how many eigenvalues.
        tol: relative error allowed of an eigenvalue; a tenth of the sampling error, but at least 1e-3, if
            None. PyHessian stops when an eigenvalue changes by less than this (1e-3 if None) in one
            iteration, which says little about its error.
        which: largest (``LA``), smallest (``SA``) or largest in magnitude (``LM``), at a saddle perhaps a
            negative one; PyHessian knows ``LM`` only. ``LA``, with PyHessian ``LM``, if None.
        matrix: ``hessian``, or ``gauss_newton`` for classifiers with one label an example (Lanczos).
        gauge: of the ``adapter`` space: ``as_is``, or ``balanced`` (BᵀB = AAᵀ) before measuring.
        engine: ``lanczos``, or ``pyhessian`` for its power iteration.
        verify: certify every eigenvalue, by a lower and an upper bound within ``tol``; without, the search
            stops when some eigenvalue is known to lie that near, after fewer products (Lanczos).
        products: ``exact`` second derivatives, central ``differences`` of gradients, or ``auto`` (Lanczos).
        memory: budget in bytes; half of what is available if None (Lanczos).
        max_iterations: limit of Hessian-vector products per eigenvalue.
        examples: use the first that many training examples; None for as many as ``interval`` asks for.
        interval: take more and more examples, drawn at random, until the sampling error of every eigenvalue
            is within this share of it; None for all examples.
        budget: of gradients of single examples, for the growing; a Hessian-vector product counts as two.
        every: also measure after every that many epochs of training, each time from the last vectors on; the
            values become columns of the run's history (Lanczos).
        precision: ``float32``: a model in half precision is measured in float32, through a copy;
            ``as_stored``: as it is, and ``error_i`` says what that leaves.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        k: Annotated[int, Field(ge=1)] = 1,
        tol: Annotated[float, Field(gt=0, lt=1)] | None = None,
        which: Which | None = None,
        matrix: Literal["hessian", "gauss_newton"] = "hessian",
        gauge: Literal["as_is", "balanced"] = "as_is",
        engine: Literal["lanczos", "pyhessian"] = "lanczos",
        verify: bool = True,
        products: Products = "auto",
        memory: Annotated[int, Field(ge=1)] | None = None,
        max_iterations: Annotated[int, Field(ge=2)] = 100,
        examples: Annotated[int, Field(ge=1)] | None = None,
        interval: Annotated[float, Field(gt=0, lt=1)] | None = INTERVAL,
        budget: Annotated[int, Field(ge=1)] = BUDGET,
        every: Annotated[int, Field(ge=1)] | None = None,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        checked(Hessian, **given)
        which = given["which"] = which or ("LM" if engine == "pyhessian" else "LA")
        if engine == "pyhessian":
            other = {"which": "LM", "matrix": "hessian", "products": "auto", "every": None}
            for option, value in other.items():
                if given[option] != value:
                    raise InputError(f"Hessian: {option}: {given[option]} needs engine: lanczos")
        self.space, self.k, self.tol, self.matrix = space, k, tol, matrix
        self.which: Which = which
        self.gauge, self.engine, self.verify, self.products = gauge, engine, verify, products
        self.memory, self.max_iterations = memory, max_iterations
        self.sampling, self.every = Sampling(examples, interval, budget), every
        self.precision: Precision = precision

    def __call__(self, subject: Subject, track: Track | None = None) -> dict[str, Any]:
        """Measure.

        Args:
            track: keeps the vectors of one measurement for the next, which begins from them.

        Returns:
            ``eigenvalue_i`` (``λ_i``, a Rayleigh quotient), ``upper_bound_i`` (the i-th wanted eigenvalue
            lies between the two, with probability 99 % for all; None where nothing is known), ``error_i``
            (their distance; without an upper bound ``residual_i``), ``residual_i`` (``‖Hv_i − λ_i v_i‖₂``:
            *some* eigenvalue lies within it of ``λ_i``), ``relative_error_bound_i`` (``error_i / |λ_i|``,
            None for a zero) and ``sampling_error_i`` (half of a 95 % interval for all training examples; 0
            where all were taken, None where too few to tell) for i = 1…k; ``certified`` (all upper bounds
            are within ``tol``), ``converged`` (some eigenvalue is known to lie within ``tol`` of each),
            ``settled`` (PyHessian's rule was met before the limit of iterations, a much weaker thing);
            ``loss`` and ``gradient_norm`` at the point; ``method`` (how products were made), ``way``
            (``whole graph`` or ``blocks``; with ``way_reason``, if there was one), ``graph``,
            ``memory_bytes`` (stated peak), ``engine``, ``tol``; ``examples``, ``example_gradients`` (of
            single examples, of all samples together), ``resolved`` (every sampling error is within
            ``interval``); ``which``, ``matrix``, ``gauge``, ``products``, ``seconds``, ``space``,
            ``dimension``, ``precision``.

        Raises:
            InputError: ``k`` is larger than the space's dimension, or there are no examples.
            NotApplicableError: the model has no such space, or no second derivatives.
            FlatbenchError: the loss or a product is not finite.
            MeasureInterrupted: Ctrl-C after something had converged.
        """
        start = time.perf_counter()
        refuse_rounded_inputs(subject.model)
        with (
            in_space(
                subject,
                self.space,
                twice_differentiable=self.products != "differences",
                precision=self.precision,
            ) as point,
            balanced(point) if self.gauge == "balanced" else contextlib.nullcontext(),
        ):
            if self.k > point.dimension:
                raise InputError(f"k: {self.k} eigenvalues wanted of a {point.dimension}-dimensional space")
            search = _Search(self, subject, point, track or Track())
            interrupted = False
            try:
                values = measured(subject.batches, self.sampling, search.on)
            except _Partial as partial:
                values, interrupted = partial.values, True
            values |= {
                "which": self.which,
                "matrix": self.matrix,
                "gauge": self.gauge,
                "products": search.products,
                "seconds": time.perf_counter() - start,
                **point.describe(),
            }
        if interrupted:
            raise MeasureInterrupted(values)
        return values

    def during(self, subject: Subject, track: Track) -> dict[str, Any]:
        """Measure, from the vectors that the last measurement ended with."""
        return self(subject, track)


class _Partial(Exception):  # noqa: N818 - no error
    """The values of an interrupted search."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values


class _Search:
    """One call of the measure."""

    def __init__(self, options: Hessian, subject: Subject, point: Point, track: Track) -> None:
        self.options, self.subject, self.point, self.track = options, subject, point, track
        self.products = 0

    def on(self, batches: Batches, share: float) -> Taken:
        """Measure on some batches, which hold this share of all examples."""
        options, size = self.options, sum(map(rows, batches))
        find = self._by_pyhessian if options.engine == "pyhessian" else self._by_lanczos
        before, tol = self.products, options.tol or self._tolerance(share)
        found, values = find(batches, tol)
        errors, more = of_eigenvalues(self._operator, batches, found.vectors, share, self.subject.seed)
        self.products += more
        finer = max(FINEST, min(map(_tenth, errors, found.values)))
        if options.tol is None and options.engine == "lanczos" and finer < tol:
            tol = finer
            found, values = find(batches, tol)
        sampling = {f"sampling_error_{i}": stated(error) for i, error in enumerate(errors, start=1)}
        return Taken(
            {**values, "tol": tol, **sampling},
            found.values,
            errors,
            size * (PRODUCT * (self.products - before) + 1),
        )

    def _tolerance(self, share: float) -> float:
        """A tenth of the sampling error, before it is known."""
        if share >= 1 or self.options.engine == "pyhessian":
            return FINEST
        return max(FINEST, (self.options.sampling.interval or INTERVAL) / 10)

    def _operator(self, batches: Batches) -> LossOperator:
        options = self.options
        if options.matrix == "gauss_newton":
            return GaussNewtonOperator(
                self.point.model,
                criterion=self._criterion,
                batches=batches,
                space=self.point.parameters,
                memory=options.memory,
                precision=options.precision,
            )
        return HessianOperator(
            self.point.model,
            self.subject.loss,
            batches,
            space=self.point.parameters,
            products=options.products,
            memory=options.memory,
            precision=options.precision,
        )

    def _criterion(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Cross entropy, which is checked once to be the task's loss."""
        labels = batch.get("labels")
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            raise NotApplicableError("Gauss-Newton is for classifiers with one label an example")
        with torch.no_grad():
            plain, terms = self.subject.loss(self.point.model, batch)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        if not torch.isclose(plain, loss.to(plain), rtol=1e-3, atol=1e-5):
            raise NotApplicableError("the task's loss is not the cross entropy of the logits")
        return loss, terms

    def _by_lanczos(self, batches: Batches, tol: float) -> tuple[Eigenpairs, dict[str, Any]]:
        options = self.options
        with derivatives(), self._operator(batches) as operator, warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result says it
            loss, gradient = operator.point()
            extra: dict[str, Any] = {"loss": loss, "gradient_norm": float(gradient.double().norm())}
            try:
                found = top_eigenpairs(
                    operator,
                    options.k,
                    tol=tol,
                    which=options.which,
                    certify=options.verify,
                    start=self.track.vectors,
                    max_products=options.max_iterations * options.k,
                    seed=derive_seed(self.subject.seed, "hessian") % 2**62,
                )
            except Interrupted as partial:
                if not partial.found.values:
                    raise
                raise _Partial({**_as_numbers(partial.found), **extra, **_cost(operator)}) from partial
            self.products += found.products
            self.track.vectors = found.vectors
            return found, {**_as_numbers(found), **extra, **_cost(operator)}

    def _by_pyhessian(self, batches: Batches, tol: float) -> tuple[Eigenpairs, dict[str, Any]]:
        from flatbench.curvature.eigenpairs.pyhessian import PyHessianEngine

        options, engine = self.options, PyHessianEngine()
        objective = Objective(replace(self.subject, batches=batches), self.point, None)
        loss, gradient = objective.gradient()
        model = self.point.model
        with derivatives(why_coarse(half_types(model))):
            found = engine.top(
                objective.mean_loss(),
                k=options.k,
                tol=tol,
                max_iterations=options.max_iterations,
                seed=derive_seed(self.subject.seed, "hessian"),
            )
        if not all(map(math.isfinite, (*found.values, *found.residuals))):
            raise FlatbenchError(f"the Hessian's eigenvalues are not finite: {found.values}")
        self.products += found.products
        if rough := UNITS * unit_of_half(half_types(model)):
            errors = [e + rough * abs(v) for e, v in zip(found.errors, found.values, strict=True)]
            found = replace(found, errors=tuple(errors))
        return found, {
            **_as_numbers(found),
            "loss": loss,
            "gradient_norm": norm(gradient),
            "method": "double backward",
            "way": "whole graph",
            "graph": "rebuilt",
            "memory_bytes": None,
            "engine": engine.name,
        }


@contextlib.contextmanager
def derivatives(cause: str = "") -> Iterator[None]:
    """Turns torch's complaint about a missing derivative into the reason why the measure does not apply.

    Args:
        cause: what a message about numbers that are not finite says besides.
    """
    try:
        yield
    except ArithmeticError as error:
        raise FlatbenchError(f"{error}{cause}") from error
    except RuntimeError as error:
        if not lacks_second_derivative(error):
            raise
        raise NotApplicableError(f"the loss has no second derivative: {error}") from error


def _tenth(error: float, value: float) -> float:
    return error / abs(value) / 10 if value and error else math.inf


def _cost(operator: LossOperator) -> dict[str, Any]:
    plan = operator.plan
    return {
        "method": plan.method,
        "way": plan.way,
        **({"way_reason": plan.way_reason} if plan.way_reason else {}),
        "graph": plan.graph,
        "memory_bytes": plan.peak_bytes,
        "engine": "lanczos",
    }


def _as_numbers(found: Eigenpairs) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for i, (value, error, residual, bound) in enumerate(
        zip(found.values, found.errors, found.residuals, found.upper_bounds, strict=True), start=1
    ):
        values[f"eigenvalue_{i}"] = value
        values[f"upper_bound_{i}"] = bound if math.isfinite(bound) else None
        values[f"error_{i}"] = error
        values[f"residual_{i}"] = residual
        values[f"relative_error_bound_{i}"] = error / abs(value) if value else None
    return {
        **values,
        "converged": all(found.converged),
        "certified": all(found.certified),
        "settled": all(found.settled),
    }
