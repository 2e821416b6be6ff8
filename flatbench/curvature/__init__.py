"""Hessian operators and what is computed from them; imports torch and nothing heavier.

>>> import torch
>>> from flatbench.curvature import MatrixOperator, top_eigenpairs
>>> matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.5], dtype=torch.float64))
>>> found = top_eigenpairs(MatrixOperator(matrix), k=2)
>>> [round(value, 6) for value in found.values]
[-5.0, 3.0]
"""

from flatbench.curvature.eigenpairs.lanczos import top_eigenpairs
from flatbench.curvature.eigenpairs.result import ConvergenceWarning, Eigenpairs, Interrupted
from flatbench.curvature.estimates.density import Density, spectral_density
from flatbench.curvature.estimates.diagonal import Diagonal, diagonal
from flatbench.curvature.estimates.trace import Estimate, frobenius_norm, trace
from flatbench.curvature.operators.base import MatrixOperator, SymmetricOperator, check_symmetric
from flatbench.curvature.operators.gauss_newton import GaussNewtonOperator
from flatbench.curvature.operators.hessian import HessianOperator
from flatbench.curvature.operators.processes import over_processes

__all__ = [
    "ConvergenceWarning",
    "Density",
    "Diagonal",
    "Eigenpairs",
    "Estimate",
    "GaussNewtonOperator",
    "HessianOperator",
    "Interrupted",
    "MatrixOperator",
    "SymmetricOperator",
    "check_symmetric",
    "diagonal",
    "frobenius_norm",
    "over_processes",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
