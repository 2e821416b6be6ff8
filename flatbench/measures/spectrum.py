"""The whole spectrum of the training loss's Hessian: its density with a band, and its trace."""

from __future__ import annotations

import time
import warnings
from typing import Annotated, Any

import torch
from pydantic import Field

from flatbench.config.registry import LATER
from flatbench.curvature.eigenpairs.result import ConvergenceWarning
from flatbench.curvature.estimates.density import spectral_density
from flatbench.curvature.estimates.trace import trace
from flatbench.curvature.operators.hessian import HessianOperator
from flatbench.curvature.operators.planned import Products
from flatbench.curvature.operators.precision import Precision
from flatbench.curvature.operators.spaces import NamedSpace
from flatbench.measures.base import Measure
from flatbench.measures.hessian import derivatives
from flatbench.measures.options import checked
from flatbench.measures.sampling import (
    BUDGET,
    INTERVAL,
    PRODUCT,
    Batches,
    Sampling,
    Taken,
    measured,
    of_trace,
)
from flatbench.seeding import derive_seed
from flatbench.subject.objective import rows
from flatbench.subject.rounding import stated
from flatbench.subject.spaces import in_space, refuse_rounded_inputs
from flatbench.subject.subject import Subject


class Spectrum(Measure):
    """Trace and spectral density of the loss's Hessian, each with the error that sampling leaves.

    The density is that of stochastic Lanczos quadrature (`flatbench.curvature.estimates.density`), the trace
    that of Hutch++ (`flatbench.curvature.estimates.trace`), of the exact mean loss over the examples in
    evaluation mode.

    Args:
        space: ``merged`` (the full weights of the adapted modules), ``adapter`` (A and B) or ``all``.
        probes: random starting vectors of the density; at least 3.
        steps: Lanczos steps of each.
        points: of the density's grid.
        tol: standard error wanted of the trace, relative to it.
        max_products: limit of Hessian-vector products for the trace.
        products: ``exact`` second derivatives, central ``differences`` of gradients, or ``auto``.
        memory: budget in bytes; half of what is available if None.
        examples: use the first that many training examples; None for as many as ``interval`` asks for.
        interval: take more and more examples, drawn at random, until the sampling error of the trace is
            within this share of it; None for all examples.
        budget: of gradients of single examples, for the growing; a Hessian-vector product counts as two.
        precision: ``float32``: a model in half precision is measured in float32, through a copy;
            ``as_stored``: as it is.
    """

    def __init__(
        self,
        *,
        space: NamedSpace = "merged",
        probes: Annotated[int, Field(ge=3)] = 5,
        steps: Annotated[int, Field(ge=2)] = 30,
        points: Annotated[int, Field(ge=2)] = 201,
        tol: Annotated[float, Field(gt=0, lt=1)] = 0.05,
        max_products: Annotated[int, Field(ge=40)] = 100,
        products: Products = "auto",
        memory: Annotated[int, Field(ge=1)] | None = None,
        examples: Annotated[int, Field(ge=1)] | None = None,
        interval: Annotated[float, Field(gt=0, lt=1)] | None = INTERVAL,
        budget: Annotated[int, Field(ge=1)] = BUDGET,
        precision: Annotated[Precision, LATER] = "float32",
    ) -> None:
        checked(Spectrum, **{k: v for k, v in locals().items() if k not in ("self", "__class__")})
        self.space, self.probes, self.steps, self.points = space, probes, steps, points
        self.tol, self.max_products, self.products = tol, max_products, products
        self.memory, self.sampling = memory, Sampling(examples, interval, budget)
        self.precision: Precision = precision

    def __call__(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Returns:
            ``trace``, ``trace_standard_error`` (of the probes), ``trace_sampling_error`` (half of a 95 %
            interval for all training examples; 0 where all were taken, None where too few to tell),
            ``trace_converged``, ``trace_rounding_error`` (estimated: the unit in which products are computed,
            times the trace and the spectrum's reach); ``eigenvalues`` (positions t,
            ``(points,)``), ``density`` (φ(t), see `flatbench.curvature.estimates.density.Density`),
            ``density_lower`` and ``density_upper`` (its 95 % band, of the probes), ``width`` (of the
            smoothing), ``outliers`` (eigenvalues that count exactly), ``hvp`` (products, on the
            last sample), ``examples``, ``example_gradients`` (of single examples, for the trace on all
            samples together), ``resolved`` (the trace's sampling error is within ``interval``), ``seconds``,
            ``space``, ``dimension``, ``precision``.

        Raises:
            InputError: there are no examples, or the memory does not do.
            NotApplicableError: the model has no such space, or no second derivatives.
            FlatbenchError: the loss or a product is not finite.
        """
        start, seed = time.perf_counter(), derive_seed(subject.seed, "spectrum") % 2**62
        refuse_rounded_inputs(subject.model)
        with (
            in_space(
                subject,
                self.space,
                twice_differentiable=self.products != "differences",
                precision=self.precision,
            ) as point,
            derivatives(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result says it
            last: Batches = ()

            def operator_of(batches: Batches) -> HessianOperator:
                return HessianOperator(
                    point.model,
                    subject.loss,
                    batches,
                    space=point.parameters,
                    products=self.products,
                    memory=self.memory,
                    precision=self.precision,
                )

            def take(batches: Batches, share: float) -> Taken:
                nonlocal last
                last = batches
                with operator_of(batches) as operator:
                    total = trace(operator, tol=self.tol, max_products=self.max_products, seed=seed)
                error, more = of_trace(operator_of, batches, share, seed)
                entries = {
                    "trace": total.value,
                    "trace_standard_error": total.standard_error,
                    "trace_sampling_error": stated(error),
                    "trace_converged": total.converged,
                    "hvp": total.products + more,
                }
                cost = PRODUCT * (total.products + more) * sum(map(rows, batches))
                return Taken(entries, [total.value], [error], cost)

            values = measured(subject.batches, self.sampling, take)
            with operator_of(last) as operator:
                found = spectral_density(
                    operator, probes=self.probes, steps=self.steps, points=self.points, seed=seed
                )
                rough = operator.relative_error + 32 * float(torch.finfo(operator.dtype).eps)
            largest = max(map(abs, (float(found.points[0]), float(found.points[-1]))))
            return {
                **values,
                "trace_rounding_error": rough * (abs(values["trace"]) + largest),
                "eigenvalues": found.points.tolist(),
                "density": found.values.tolist(),
                "density_lower": found.lower.tolist(),
                "density_upper": found.upper.tolist(),
                "width": found.width,
                "outliers": list(found.outliers),
                "hvp": values["hvp"] + found.products,
                "seconds": time.perf_counter() - start,
                **point.describe(),
            }
