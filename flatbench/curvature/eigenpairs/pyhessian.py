"""Eigenpairs by PyHessian's power iteration, with the error bound that PyHessian does not give.

PyHessian: Yao, Gholami, Keutzer, Mahoney, "PyHessian: Neural Networks Through the Lens of the Hessian", 2020,
arXiv 1912.07145.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import version

import pyhessian
import torch
from torch import Tensor, nn

from flatbench.curvature.eigenpairs.result import Eigenpairs, MeanLoss


class PyHessianEngine:
    """Power iteration with deflation, one eigenpair after the other, as PyHessian 0.1 does it.

    PyHessian stops when two consecutive Rayleigh quotients differ by less than ``tol`` relatively, and
    returns the older quotient beside the newer vector. Here one more product per pair gives the quotient
    and the residual of the vector itself.
    """

    @property
    def name(self) -> str:
        """Package and version."""
        return f"pyhessian {version('pyhessian')}"

    def top(self, loss: MeanLoss, *, k: int, tol: float, max_iterations: int, seed: int) -> Eigenpairs:
        """The ``k`` pairs with the largest ``|λ|``.

        Args:
            tol: relative change of an eigenvalue in one iteration at which PyHessian stops.
            max_iterations: limit of Hessian-vector products per pair.
            seed: decides the start vectors; the global random state is left as it was.

        Raises ArithmeticError if a product is not finite.
        """
        start = time.perf_counter()
        with _pyhessian_globals(loss, seed):
            operator = _Operator(loss)
            _, found = operator.eigenvalues(maxIter=max_iterations, tol=tol, top_n=k)
            settled = convergence_by_rule(operator.quotients, tol, max_iterations)
            pairs = [
                (*_rayleigh(operator, vector), done) for vector, done in zip(found, settled, strict=True)
            ]
        pairs.sort(key=lambda pair: -abs(pair[0]))
        values, residuals, vectors, settled_flags = zip(*pairs, strict=True)
        return Eigenpairs(
            values=values,
            residuals=residuals,
            errors=residuals,
            upper_bounds=(math.inf,) * k,
            vectors=torch.stack([torch.cat([part.flatten() for part in v]) for v in vectors], dim=1),
            converged=tuple(r <= tol * abs(v) for v, r in zip(values, residuals, strict=True)),
            certified=(False,) * k,
            settled=settled_flags,
            products=len(operator.quotients),
            seconds=time.perf_counter() - start,
        )


class _Batch:
    """Stands in for PyHessian's input and target tensors: it only asks for the size and moves them."""

    def __init__(self, loss: Callable[[], Tensor], terms: int) -> None:
        self.loss, self.terms = loss, terms

    def size(self, dim: int) -> int:
        return self.terms  # PyHessian weighs a batch with its first dimension

    def to(self, device: object) -> _Batch:
        return self


class _Model(nn.Module):
    """What PyHessian takes for the network: its parameters are exactly those of the loss."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)

    def forward(self, batch: _Batch) -> Tensor:
        loss = batch.loss()
        # PyHessian fails on a parameter without second derivatives (unused, or linear in the loss):
        # a term that is zero with its derivatives brings all into the graph
        for parameter in self.held:
            loss = loss + (0 * parameter).square().sum()
        return loss


class _Operator(pyhessian.hessian):  # type: ignore[misc]  # PyHessian has no types
    """PyHessian's class, remembering the Rayleigh quotient of each product."""

    def __init__(self, loss: MeanLoss) -> None:
        self.quotients: list[float] = []
        batches = [_Batch(*pair) for pair in zip(loss.losses, loss.terms, strict=True)]
        super().__init__(
            _Model(loss.parameters),
            lambda outputs, targets: outputs,
            dataloader=[(batch, batch) for batch in batches],
            cuda=loss.parameters[0].is_cuda,
        )

    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        quotient, product = super().dataloader_hv_product(v)
        if not math.isfinite(quotient):
            raise ArithmeticError(f"a Hessian-vector product is not finite (vᵀHv = {quotient})")
        self.quotients.append(quotient)
        return quotient, product


@contextmanager
def _pyhessian_globals(loss: MeanLoss, seed: int) -> Iterator[None]:
    """Everything global that PyHessian touches: random state, current device, a warning about cycles."""
    device = loss.parameters[0].device
    with (
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),  # it draws on the CPU, whatever the device
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),  # its tensors go to "cuda"
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
        torch.default_generator.manual_seed(seed)
        yield


def _rayleigh(operator: _Operator, vector: Sequence[Tensor]) -> tuple[float, float, tuple[Tensor, ...]]:
    """Value, residual and unit vector of one approximate eigenvector, at the price of one product."""
    norm = _norm(vector)
    if norm == 0:  # the start vector was mapped to zero: H vanishes on it, and any such direction serves
        vector = [torch.randn(part.shape).to(part) for part in vector]
        norm = _norm(vector)
    unit = [part / norm for part in vector]
    value, product = operator.dataloader_hv_product(unit)
    residual = _norm([hv - value * part for hv, part in zip(product, unit, strict=True)])
    return value, residual, tuple(part.detach() for part in unit)


def _norm(parts: Sequence[Tensor]) -> float:
    """Euclidean norm over all parts, accumulated in float64."""
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def convergence_by_rule(quotients: Sequence[float], tol: float, max_iterations: int) -> list[bool]:
    """Per eigenpair, whether PyHessian's rule ended its search: the rule, replayed on what it saw."""
    flags: list[bool] = []
    previous: float | None = None
    count = 0
    for quotient in quotients:
        count += 1
        close = previous is not None and abs(previous - quotient) / (abs(previous) + 1e-6) < tol
        if close or count == max_iterations:
            flags.append(close)
            previous, count = None, 0
        else:
            previous = quotient
    return flags
