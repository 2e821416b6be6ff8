"""Extreme eigenpairs of a symmetric operator, with what their error is known to be."""
