"""Hessian operators and what is computed from them; imports torch and nothing heavier.

>>> import torch
>>> from flatbench.curvature import MatrixOperator, top_eigenpairs
>>> matrix = torch.diag(torch.tensor([3.0, -5.0, 1.0, 0.5], dtype=torch.float64))
>>> found = top_eigenpairs(MatrixOperator(matrix), k=2)
>>> [round(value, 6) for value in found.values]
[-5.0, 3.0]
"""

from flatbench.curvature.density import Density, spectral_density
from flatbench.curvature.diagonal import Diagonal, diagonal
from flatbench.curvature.eigenpairs import ConvergenceWarning, Eigenpairs, Interrupted
from flatbench.curvature.gauss_newton import GaussNewtonOperator
from flatbench.curvature.hessian import HessianOperator
from flatbench.curvature.lanczos import top_eigenpairs
from flatbench.curvature.operator import MatrixOperator, SymmetricOperator, check_symmetric
from flatbench.curvature.trace import Estimate, frobenius_norm, trace

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
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
